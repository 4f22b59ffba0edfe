// Choosing what is searched for: a file, several, a drop, the clipboard; and what was chosen.
import { Icon } from "../components/icons.js";
import { MODALITIES } from "../format.js";
import { html, useEffect, useRef, useState } from "../ui.js";
import { BoxDialog } from "./box.js";
import {
  MOST_IMAGES, answer, begin, box, boxUrl, choose, drop, earlier, goBack, pictures, remark, reset, search, searching,
} from "./state.js";

// What the service reads; a browser may not show all of it.
const ACCEPTED = "image/jpeg,image/png,image/webp,image/bmp,image/tiff,.tif,.tiff";

const SOURCES = { detected: "detected", given: "as you said", camera: "as the camera's defaults say" };

/** The files of a drop or of the clipboard; a folder counts as none. */
function filesOf(transfer) {
  const items = [...(transfer?.items ?? [])].filter((item) => item.kind === "file");
  const files = items.filter((item) => !item.webkitGetAsEntry?.()?.isDirectory)
    .map((item) => item.getAsFile()).filter(Boolean);
  return { files, folders: items.length - files.length };
}

/** Search for the pictures of a drop or of the clipboard. */
export function take(transfer) {
  const { files, folders } = filesOf(transfer);
  if (files.length) choose(files);
  else if (folders) remark.value = "A folder is no query. Drop pictures of one person here; folders go to Enroll.";
}

/** Whether files are held over the page; drops and pastes anywhere in it start a search. */
function useTransfers() {
  const [over, setOver] = useState(false);
  useEffect(() => {
    const withFiles = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
    const modal = () => document.querySelector("dialog[open]") !== null;
    const hold = (event) => {
      if (!withFiles(event)) return;
      event.preventDefault(); // else the browser would open the file in place of the page
      if (!modal()) setOver(true);
    };
    const leave = (event) => { if (!event.relatedTarget) setOver(false); };
    const dropped = (event) => {
      if (!withFiles(event)) return;
      event.preventDefault();
      setOver(false);
      if (!modal()) take(event.dataTransfer);
    };
    const pasted = (event) => {
      if (!modal() && filesOf(event.clipboardData).files.length) {
        event.preventDefault();
        take(event.clipboardData);
      }
    };
    const listeners = { dragenter: hold, dragover: hold, dragleave: leave, drop: dropped, paste: pasted };
    for (const [name, listener] of Object.entries(listeners)) addEventListener(name, listener);
    return () => {
      for (const [name, listener] of Object.entries(listeners)) removeEventListener(name, listener);
    };
  }, []);
  return over;
}

/** The clipboard by a button: for hands without a keyboard. */
async function paste() {
  const turn = begin();
  try {
    const files = [];
    for (const item of await navigator.clipboard.read()) {
      const type = item.types.find((one) => one.startsWith("image/"));
      if (type) files.push(new File([await item.getType(type)], "pasted picture", { type }));
    }
    if (files.length) choose(files, { turn });
    else if (!turn.aborted) remark.value = "The clipboard holds no picture; copy one first.";
  } catch {
    if (!turn.aborted) remark.value = "The browser did not let the page read the clipboard; press Ctrl+V instead.";
  }
}

export function Pick() {
  const input = useRef(null);
  const more = useRef(false);
  const [drawing, setDrawing] = useState(false);
  const over = useTransfers();
  const chosen = pictures.value;
  const found = chosen.length > 0 && answer.value?.pictures === chosen ? answer.value.body.query : null;
  const single = chosen.length === 1 ? chosen[0] : null;
  const changed = (event) => {
    const files = [...event.target.files];
    event.target.value = ""; // so that the same file can be chosen again
    if (files.length) choose(files, { more: more.current });
    more.current = false;
  };
  const open = (add) => { more.current = add; input.current.click(); };
  return html`
    <section class=${`card pick ${over ? "pick-over" : ""}`} aria-label="Query">
      <label class=${`dropzone ${chosen.length ? "dropzone-small" : ""}`}>
        <input ref=${input} class="visually-hidden" type="file" name="query" multiple accept=${ACCEPTED}
          aria-label="Pictures of the person you look for" onChange=${changed}
          onCancel=${() => { more.current = false; }} />
        <${Icon} name="upload" size=${chosen.length ? 18 : 26} />
        <span><strong>${chosen.length ? "Another person" : "Choose or drop a picture of a person"}</strong>
          ${!chosen.length && html`<span class="soft">or paste one with Ctrl+V. Infrared or visible; a crop, up to
            ${` ${MOST_IMAGES} `}of the same person, or a whole frame.</span>`}</span>
      </label>
      ${over && html`<p class="drop-hint" aria-hidden="true">Drop to search</p>`}
      ${chosen.length > 0 && html`
        <ul class=${`chosen ${single ? "chosen-one" : ""}`} aria-label="Chosen pictures">
          ${chosen.map((picture) => html`<${Chosen} key=${picture.key} picture=${picture}
            removable=${!single} part=${single && boxUrl.value} />`)}
        </ul>`}
      ${found && html`<p class="soft" data-testid="taken-as">Taken as ${MODALITIES[found.modality]}: ${
        single?.item && found.modality_source === "given" ? "as it is stored" : SOURCES[found.modality_source]}.</p>`}
      ${single && html`<${Frame} picture=${single} onDraw=${() => setDrawing(true)} />`}
      ${remark.value && html`<p class="notice warning small" role="status">${remark.value}</p>`}
      <div class="row">
        ${chosen.length > 0 && chosen.length < MOST_IMAGES && html`
          <button type="button" class="button small" onClick=${() => open(true)}>
            <${Icon} name="plus" /> Add a picture of this person</button>`}
        ${single && html`<button type="button" class="button small" onClick=${() => setDrawing(true)}>
          <${Icon} name="box" /> ${box.value ? "Change the box" : "Draw a box"}</button>`}
        ${!chosen.length && navigator.clipboard?.read && html`
          <button type="button" class="button small" onClick=${paste}>Paste a picture</button>`}
        ${earlier.value.length > 0 && html`<button type="button" class="button small" onClick=${goBack}>
          <${Icon} name="left" /> Previous query</button>`}
        ${chosen.length > 0 && html`<button type="button" class="button small quiet" onClick=${reset}>Clear</button>`}
      </div>
      <button type="button" class="button primary" disabled=${!chosen.length} onClick=${search}>
        ${searching.value ? html`<span class="spinner" aria-hidden="true"></span>` : html`<${Icon} name="search" />`} Search</button>
      ${drawing && single && html`<${BoxDialog} key=${single.key} picture=${single} onClose=${() => setDrawing(false)} />`}
    </section>`;
}

/** One picture of the query. part: URL of the part that is searched for. */
function Chosen({ picture, removable, part }) {
  const [shown, setShown] = useState(true);
  const name = picture.file.name;
  return html`
    <li>
      <figure>
        ${shown
          ? html`<img src=${part ?? picture.url} alt=${`Query: ${name}`} onError=${() => setShown(false)} />`
          : html`<span class="no-preview">${picture.file.size === 0 ? "This file is empty."
            : "This browser cannot show this file. The service reads JPEG, PNG, WebP, BMP and TIFF."}</span>`}
        <figcaption class="soft text" title=${name}>${name}</figcaption>
      </figure>
      ${removable && html`<button type="button" class="button small quiet remove" aria-label=${`Leave out ${name}`}
        onClick=${() => drop(picture)}>✕</button>`}
    </li>`;
}

/** What is to be said of the size of the one picture. */
function Frame({ picture, onDraw }) {
  const [wide, setWide] = useState(false);
  useEffect(() => {
    let gone = false;
    setWide(false);
    const image = new Image();
    image.onload = () => { if (!gone) setWide(image.naturalWidth > 0.9 * image.naturalHeight); };
    image.src = picture.url;
    return () => { gone = true; };
  }, [picture]);
  const part = box.value;
  if (part) return html`<p class="soft">The part ${part.width} × ${part.height} at ${part.x}, ${part.y} is searched for.</p>`;
  return wide && html`
    <div class="notice warning small" role="status">
      <p>This looks like a whole frame. Answers are good only for one person's crop: draw a box around the person.</p>
      <div><button type="button" class="button small" onClick=${onDraw}>Draw the box</button></div>
    </div>`;
}
