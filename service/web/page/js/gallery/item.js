// One item: its crop, all that is known of it, and what can be done with it.
import { getItem, isAborted, patchItem } from "../api.js";
import { Loaded, useLoaded, useNewKey } from "../components/loaded.js";
import { Picture } from "../components/picture.js";
import { Problem } from "../components/problem.js";
import { TimeField } from "../components/time_field.js";
import { MODALITIES, instant, personName, time } from "../format.js";
import { go, href } from "../router.js";
import { itemChanged, searchLike } from "../search/state.js";
import { announce, cameras, noteCameras, notePersons, persons } from "../state.js";
import { html, useEffect, useId, useRef, useState } from "../ui.js";
import { described } from "./cards.js";
import { Delete, Erase } from "./erase.js";
import { localTime } from "./view.js";

const SOURCES = { given: "as its sender said", camera: "by its camera's defaults", detected: "detected" };
const POLARITIES = { white_hot: "white is hot", black_hot: "black is hot" };

// Each address has a view of its own: nothing of another item is shown at it, or acted on.
export const ItemView = ({ id }) => html`<${Opened} key=${id} id=${id} />`;

function Opened({ id }) {
  const loaded = useLoaded((options) => getItem(id, options), [], { acting: true });
  useEffect(() => {
    scrollTo({ top: 0 });
    if (document.activeElement === document.body) document.querySelector("main").focus();
  }, []);
  const [changed, setChanged] = useState(null); // the item as it was saved last
  const [erased, setErased] = useState(null); // what was erased, in words
  if (erased || loaded.error?.code === "item_not_found") return html`<${Gone} what=${erased} />`;
  const item = changed ?? loaded.value;
  return html`
    <section class="view">
      <${Loaded} loaded=${loaded} what="the item">
        ${item && html`<${Item} key=${item.id} item=${item} onSaved=${setChanged} onErased=${setErased} />`}
      <//>
    </section>`;
}

function Gone({ what }) {
  useEffect(() => { document.querySelector("main").focus(); }, []); // what had the focus is gone
  return html`
    <section class="view">
      <h1>Item</h1>
      <div class="empty" role="status">
        <strong>${what ?? "This item is not there"}</strong>
        <p>${what ? "No query returns it any more." : "There is no such item: it was deleted, or its address is mistyped."}</p>
        <a class="button primary" href=${href("gallery")}>To the gallery</a>
      </div>
    </section>`;
}

function Item({ item, onSaved, onErased }) {
  const [asking, setAsking] = useState(null);
  const close = () => setAsking(null);
  const person = item.person_id;
  const search = () => { go("search"); searchLike(item); };
  return html`
    <h1 class="text of-item">${person === null ? "Unlabelled item" : personName(item).replace(/^p/, "P")}</h1>
    <div class="item">
      <figure class="card item-picture">
        <${Picture} id=${item.id} alt=${described(item)} eager=${true} />
      </figure>
      <div class="stack item-side">
        <div class="row">
          <button type="button" class="button primary" onClick=${search}>Search for this person</button>
          ${person !== null && html`
            <a class="button" href=${href("timeline", "", { person_id: person })}>Where seen</a>
            <a class="button" href=${href("gallery", "", { person_id: person })}>All pictures</a>`}
        </div>
        <${Correct} item=${item} onSaved=${onSaved} />
        <${Facts} item=${item} />
        <div class="row">
          <button type="button" class="button" onClick=${() => setAsking("delete")}>Delete this item …</button>
          ${person !== null && html`
            <button type="button" class="button" onClick=${() => setAsking("erase")}>Erase this person …</button>`}
        </div>
      </div>
    </div>
    ${asking === "delete" && html`<${Delete} item=${item} onClose=${close}
      onDeleted=${() => onErased("The item is deleted")} />`}
    ${asking === "erase" && html`<${Erase} person=${person} onClose=${close}
      onErased=${() => onErased("The person is erased")} />`}`;
}

/** What a field of text showed before anybody touched it: not all that a label has can be typed. */
function untouched(input) {
  const fresh = input.cloneNode();
  fresh.value = input.defaultValue;
  return fresh.value;
}

/** What the reader changed of an item: the body of a PATCH. */
function changesOf(item, form) {
  const changes = {};
  for (const name of ["person_id", "camera_id"]) {
    const input = form.elements[name], label = input.value.trim() || null;
    if (input.value !== untouched(input) && label !== item[name]) changes[name] = label;
  }
  // Compared as it is shown, with seconds or without: a field holds neither fractions of a second nor
  // all years, nor which of two equal hours it was when the clocks went back.
  const { value } = form.elements.captured_at, shown = localTime(item.captured_at);
  if (value !== shown && Date.parse(value) !== Date.parse(shown)) changes.captured_at = instant(value) || null;
  return changes;
}

function Correct({ item, onSaved }) {
  const id = useId();
  const form = useRef(null);
  const [state, setState] = useState({ busy: false, error: null, saved: false });
  const save = async () => {
    if (!form.current.reportValidity()) return;
    const changes = changesOf(item, form.current);
    if (!Object.keys(changes).length) {
      setState({ busy: false, error: null, saved: false });
      announce("Nothing was changed");
      return;
    }
    setState({ busy: true, error: null, saved: false });
    try {
      const changed = await patchItem(item.id, changes);
      noteCameras([changed.camera_id]);
      notePersons([changed.person_id]);
      itemChanged(item.id, changed);
      onSaved(changed);
      setState({ busy: false, error: null, saved: true });
      announce("Saved");
    } catch (error) {
      if (!isAborted(error)) setState({ busy: false, error, saved: false });
    }
  };
  useNewKey(state.error, save);
  const submit = (event) => {
    event.preventDefault();
    save();
  };
  const touched = () => { if (state.saved) setState({ ...state, saved: false }); };
  const zone = Intl.DateTimeFormat().resolvedOptions().timeZone;
  return html`
    <form class="card padded stack" aria-label="Correct" ref=${form} onSubmit=${submit} onInput=${touched}>
      <div class="correct">
        <label class="field"><span>Person</span>
          <input name="person_id" defaultValue=${item.person_id ?? ""} list=${`${id}p`} maxlength="128" placeholder="unlabelled" autocomplete="off" /></label>
        <label class="field"><span>Camera</span>
          <input name="camera_id" defaultValue=${item.camera_id ?? ""} list=${`${id}c`} maxlength="128" placeholder="no camera" autocomplete="off" /></label>
        <${TimeField} label=${`Captured (${zone})`} name="captured_at" value=${localTime(item.captured_at)} />
      </div>
      ${state.error && html`<${Problem} error=${state.error} onRetry=${save} />`}
      <div class="row">
        <button type="submit" class="button" disabled=${state.busy}>${state.busy ? "Saving …" : "Save"}</button>
        <span class="soft" role="status">${state.saved ? "Saved. Queries filter by it from now on." : ""}</span>
      </div>
      <datalist id=${`${id}p`}>${[...persons.value].sort().map((one) => html`<option key=${one} value=${one} />`)}</datalist>
      <datalist id=${`${id}c`}>${[...cameras.value].sort().map((one) => html`<option key=${one} value=${one} />`)}</datalist>
    </form>`;
}

/** A text with what nobody would see, or what would turn the rest around, as its code; joiners are
 * parts of words and emoji. */
const visible = (text) => text.replace(/(?![\u200c\u200d])[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Cn}]/gu, (sign) => `\\u{${sign.codePointAt(0).toString(16)}}`);

function Facts({ item }) {
  const metadata = Object.entries(item.metadata);
  return html`
    <div class="card padded">
      <dl class="item-facts">
        <dt>Captured</dt><dd>${time(item.captured_at)}</dd>
        <dt>Enrolled</dt><dd>${time(item.enrolled_at)}</dd>
        <dt>Modality</dt><dd>${MODALITIES[item.modality]}, ${SOURCES[item.modality_source] ?? item.modality_source}</dd>
        ${item.polarity && html`<dt>Polarity</dt><dd>${POLARITIES[item.polarity] ?? item.polarity}</dd>`}
        <dt>Size</dt><dd>${item.width} × ${item.height} pixels, ${item.bit_depth} bits</dd>
        <dt>Id</dt><dd><code>${item.id}</code></dd>
        <dt>SHA-256</dt><dd><code>${item.sha256}</code></dd>
        <dt>Checkpoint</dt><dd><code>${item.model}</code></dd>
        ${metadata.length === 0 && html`<dt>Metadata</dt><dd>none</dd>`}
        ${metadata.map(([name, value]) => html`<dt class="text">${visible(name)}</dt>
          <dd class="text">${typeof value === "string" ? visible(value) : html`<code>${visible(JSON.stringify(value))}</code>`}</dd>`)}
      </dl>
    </div>`;
}
