// Draw a box around the person in a whole frame: with the pointer, or by numbers.
import { Dialog } from "../components/dialog.js";
import { html, useRef, useState } from "../ui.js";
import { begin, box, searchPart } from "./state.js";

const LEAST = { width: 16, height: 32 }; // what the service takes

const clamp = (value, least, most) => Math.min(Math.max(value, least), most);

/** What is wrong with a box in a picture of that size, null where unknown: a sentence, or null. */
function fault(part, size) {
  if (Object.values(part).some((value) => !Number.isSafeInteger(value))) return "Give four whole numbers.";
  if (part.x < 0 || part.y < 0) return "Left and top are at least 0.";
  if (part.width < LEAST.width || part.height < LEAST.height) {
    return `A box has at least ${LEAST.width} × ${LEAST.height} pixels; make it larger.`;
  }
  const inside = size === null || part.x + part.width <= size.width && part.y + part.height <= size.height;
  return inside ? null : `The box must lie inside the picture, which is ${size.width} × ${size.height}.`;
}

/** A picture of a part of an image, or null. */
async function cut(image, part) {
  const canvas = document.createElement("canvas");
  canvas.width = part.width;
  canvas.height = part.height;
  canvas.getContext("2d").drawImage(
    image, part.x, part.y, part.width, part.height, 0, 0, part.width, part.height,
  );
  return new Promise((resolve) => { canvas.toBlob(resolve, "image/png"); });
}

const FIELDS = [["x", "Left"], ["y", "Top"], ["width", "Width"], ["height", "Height"]];

export function BoxDialog({ picture, onClose }) {
  const image = useRef(null);
  const start = useRef(null);
  const [size, setSize] = useState(null);
  const [blind, setBlind] = useState(false); // the browser cannot show the picture
  const [part, setPart] = useState(box.value);
  const wrong = part && fault(part, size);

  // What was typed before the picture came, or failed, stays.
  const propose = (proposed) => setPart((present) => present ?? proposed);
  const loaded = () => {
    const found = { width: image.current.naturalWidth, height: image.current.naturalHeight };
    setSize(found);
    propose({
      x: Math.round(found.width * 0.35), y: Math.round(found.height * 0.1),
      width: Math.round(found.width * 0.3), height: Math.round(found.height * 0.8),
    });
  };
  const failed = () => {
    setBlind(true);
    propose({ x: 0, y: 0, width: 64, height: 128 });
  };
  const at = (event) => {
    const frame = image.current.getBoundingClientRect();
    return {
      x: clamp(Math.round(((event.clientX - frame.left) / frame.width) * size.width), 0, size.width),
      y: clamp(Math.round(((event.clientY - frame.top) / frame.height) * size.height), 0, size.height),
    };
  };
  const down = (event) => {
    if (!size || event.button !== 0) return;
    event.preventDefault();
    event.currentTarget.setPointerCapture(event.pointerId);
    start.current = at(event);
  };
  const dragged = (event) => {
    if (!start.current) return;
    const end = at(event), from = start.current;
    const drawn = {
      x: Math.min(from.x, end.x), y: Math.min(from.y, end.y),
      width: Math.abs(end.x - from.x), height: Math.abs(end.y - from.y),
    };
    if (drawn.width > 3 && drawn.height > 3) setPart(drawn);
  };
  const up = () => { start.current = null; };
  const set = (name, text) => setPart((present) => ({
    ...(present ?? { x: 0, y: 0, width: 0, height: 0 }), [name]: text === "" ? NaN : Number(text),
  }));
  const apply = async () => {
    const turn = begin();
    const crop = size ? cut(image.current, part) : null; // while the image is there
    onClose();
    searchPart(part, await crop, turn);
  };
  const whole = () => { onClose(); searchPart(null, null); };

  return html`
    <${Dialog} title="Draw a box around the person" wide onClose=${onClose} footer=${html`
      ${box.value && html`<button type="button" class="button" onClick=${whole}>Use the whole picture</button>`}
      <button type="button" class="button" onClick=${onClose}>Cancel</button>
      <button type="button" class="button primary" disabled=${!part || Boolean(wrong) || (!size && !blind)} onClick=${apply}>Search this part</button>`}>
      <div class="stack">
        ${blind ? html`<p class="notice warning">This browser cannot show the picture; give the box by numbers.</p>` : html`
          <div class="canvas" onPointerDown=${down} onPointerMove=${dragged} onPointerUp=${up} onPointerCancel=${up}>
            <img ref=${image} src=${picture.url} alt=${`Whole picture: ${picture.file.name}`} draggable=${false}
              onLoad=${loaded} onError=${failed} />
            ${size && part && html`<span class="drawn" style=${{
              left: `${(100 * part.x) / size.width}%`, top: `${(100 * part.y) / size.height}%`,
              width: `${(100 * part.width) / size.width}%`, height: `${(100 * part.height) / size.height}%`,
            }}></span>`}
          </div>`}
        <p class="soft">Drag over the picture, or set the numbers: pixels from its upper left corner.
          ${size && ` The picture is ${size.width} × ${size.height}.`}</p>
        <div class="four">
          ${FIELDS.map(([name, label]) => html`
            <label class="field" key=${name}><span>${label}</span>
              <input type="number" name=${name} min="0" step="1" value=${Number.isNaN(part?.[name]) ? "" : part?.[name]}
                onInput=${(event) => set(name, event.target.value)} /></label>`)}
        </div>
        <p role="status" class="wrong">${wrong}</p>
      </div>
    <//>`;
}
