// The gallery, page by page, and what of it is looked for. Filters and page stand in the address, so
// that the browser's own way back works and a view can be passed on.
import { listItems } from "../api.js";
import { Loaded, useLoaded } from "../components/loaded.js";
import { TimeField } from "../components/time_field.js";
import { MODALITIES, instant, plural } from "../format.js";
import { go, href } from "../router.js";
import { announce, cameras, noteCameras, notePersons, persons } from "../state.js";
import { html, useId, useLayoutEffect, useRef, useState } from "../ui.js";
import { Erase } from "./erase.js";
import { Cards } from "./cards.js";

const PER_PAGE = 60;
const FILTERS = ["person_id", "camera_id", "modality", "from", "to"];

// Cursors lead onwards only; the way back is what was seen on the way.
const before = new Map(); // cursor → the parameters of the page before it
let opened = null; // the id of the item that was opened last

/** The filters of an address as GET /gallery takes them. from, to: local times, or instants. */
export function filtersOf(parameters) {
  return {
    person_id: parameters.person_id,
    camera_id: parameters.camera_id,
    modality: parameters.modality,
    captured_from: localTime(parameters.from) && instant(parameters.from),
    captured_to: localTime(parameters.to) && instant(parameters.to),
  };
}

export function GalleryView({ parameters: given }) {
  const parameters = Object.fromEntries(given);
  const { page = "1", cursor, ...chosen } = parameters;
  const wanted = given.toString();
  const loaded = useLoaded(async (options) => {
    const found = await listItems({ ...filtersOf(chosen), limit: PER_PAGE, cursor }, options);
    noteCameras(found.items.map((item) => item.camera_id));
    notePersons(found.items.map((item) => item.person_id));
    if (found.next_cursor) before.set(found.next_cursor, parameters);
    announce(found.total ? plural(found.total, "item") : "Nothing found");
    return { found, wanted, chosen, cursor, number: cursor ? numberOf(page, found) : 1 };
  }, [wanted], { acting: true });
  return html`
    <section class="view">
      <h1>Gallery</h1>
      <${Filters} key=${FILTERS.map((name) => chosen[name]).join("\n")} chosen=${chosen} />
      <${Loaded} loaded=${loaded} what="the gallery">
        <${Page} key=${loaded.value?.wanted} ...${loaded.value} stale=${loaded.value?.wanted !== wanted} onChange=${loaded.reload} />
      <//>
    </section>`;
}

/** The number of a page as its address says it, or null where it cannot be that one. */
function numberOf(text, { items, total }) {
  const number = /^[1-9]\d{0,8}$/.test(text) ? Number(text) : 1;
  return number > 1 && (number - 1) * PER_PAGE + items.length <= total ? number : null;
}

// Its fields start as the address says and are the reader's then: no later drawing changes them.
function Filters({ chosen }) {
  const id = useId();
  const submit = (event) => {
    event.preventDefault();
    const fields = [...new FormData(event.target)].map(([name, text]) => [name, text.trim()]);
    go("gallery", "", Object.fromEntries(fields.filter(([, text]) => text)));
  };
  const any = FILTERS.some((name) => chosen[name]);
  return html`
    <form class="card padded filters" role="search" aria-label="Gallery" onSubmit=${submit}>
      <label class="field"><span>Person</span>
        <input name="person_id" defaultValue=${chosen.person_id} list=${`${id}p`} maxlength="128" autocomplete="off" /></label>
      <label class="field"><span>Camera</span>
        <input name="camera_id" defaultValue=${chosen.camera_id} list=${`${id}c`} maxlength="128" autocomplete="off" /></label>
      <label class="field"><span>Modality</span>
        <select name="modality">${[["", "any"], ["rgb", "visible"], ["ir", "infrared"]].map(([value, words]) => html`
          <option key=${value} value=${value} selected=${value === (chosen.modality ?? "")}>${words}</option>`)}
        </select></label>
      <div class="when"><${TimeField} label="Captured from" name="from" value=${localTime(chosen.from)} /></div>
      <div class="when"><${TimeField} label="Captured until" name="to" value=${localTime(chosen.to)} /></div>
      <div class="row filters-do">
        <button type="submit" class="button primary">Show</button>
        ${any && html`<a class="button" href=${href("gallery")}>Clear</a>`}
      </div>
      <datalist id=${`${id}p`}>${[...persons.value].sort().map((one) => html`<option key=${one} value=${one} />`)}</datalist>
      <datalist id=${`${id}c`}>${[...cameras.value].sort().map((one) => html`<option key=${one} value=${one} />`)}</datalist>
    </form>`;
}

/** A time of an address as <input type="datetime-local"> holds it; empty where it is none,
 * or in a year that such a field cannot hold. */
export function localTime(text) {
  const moment = new Date(text ?? "");
  if (Number.isNaN(moment.getTime())) return "";
  if (moment.getFullYear() < 1 || moment.getFullYear() > 9999) return "";
  const two = (number) => String(number).padStart(2, "0");
  const year = String(moment.getFullYear()).padStart(4, "0");
  return `${year}-${two(moment.getMonth() + 1)}-${two(moment.getDate())}`
    + `T${two(moment.getHours())}:${two(moment.getMinutes())}:${two(moment.getSeconds())}`;
}

// stale: another page is on its way, and this one's person is no longer the address's.
function Page({ found, chosen, number, cursor, stale, onChange }) {
  const [erasing, setErasing] = useState(false);
  const { items, total } = found;
  const cards = useRef(null);
  useLayoutEffect(() => { // back from an item: where it was opened
    const card = opened && cards.current?.querySelector(`[data-item="${CSS.escape(opened)}"]`);
    opened = null;
    card?.scrollIntoView({ block: "center" });
    card?.querySelector("a").focus({ preventScroll: true });
  }, []);
  if (!items.length) return html`<${Nothing} chosen=${chosen} later=${Boolean(cursor)} />`;
  const first = (number - 1) * PER_PAGE + 1;
  const person = chosen.person_id;
  return html`
    <div class="bar">
      <p data-testid="total">${number === null ? html`<b>${items.length}</b> of ${plural(total, "item")}` : total > items.length
        ? html`<b>${first.toLocaleString("en")}–${(first + items.length - 1).toLocaleString("en")}</b> of ${plural(total, "item")}`
        : html`<b>${plural(total, "item")}</b>`}</p>
      ${person && !stale && html`<div class="row">
        <a class="button small" href=${href("timeline", "", { person_id: person })}>Where seen</a>
        <button type="button" class="button small" onClick=${() => setErasing(true)}>Erase this person …</button>
      </div>`}
    </div>
    <div ref=${cards} onClick=${(event) => { opened = event.target.closest("[data-item]")?.dataset.item; }}>
      <${Cards} items=${items} /></div>
    <${Paging} next=${found.next_cursor} chosen=${chosen} number=${number} cursor=${cursor} total=${total} />
    ${erasing && !stale && html`<${Erase} person=${person} onClose=${() => setErasing(false)}
      onErased=${() => { setErasing(false); onChange(); }} />`}`;
}

function Paging({ next, chosen, number, cursor, total }) {
  if (!next && !cursor) return null;
  const top = () => { document.querySelector("main").focus(); scrollTo({ top: 0 }); };
  const back = before.get(cursor);
  return html`
    <nav class="row paging" aria-label="Pages" onClick=${(event) => { if (event.target.closest("a")) top(); }}>
      ${cursor && html`<a class="button" href=${href("gallery", "", chosen)}>First page</a>`}
      ${back && html`<a class="button" href=${href("gallery", "", back)}>Previous</a>`}
      ${number && html`<span class="soft">Page ${number} of ${Math.max(number, Math.ceil(total / PER_PAGE))}</span>`}
      ${next && html`<a class="button" href=${href("gallery", "", { ...chosen, ...(number && { page: number + 1 }), cursor: next })}>Next</a>`}
    </nav>`;
}

function Nothing({ chosen, later }) {
  if (later) {
    return html`<div class="empty"><strong>This page is empty now</strong>
      <p>What stood here was deleted.</p>
      <a class="button" href=${href("gallery", "", chosen)}>First page</a></div>`;
  }
  if (FILTERS.some((name) => chosen[name])) {
    const said = [
      chosen.person_id && `person ${chosen.person_id}`,
      chosen.camera_id && `camera ${chosen.camera_id}`,
      MODALITIES[chosen.modality],
    ].filter(Boolean).join(", ");
    return html`<div class="empty"><strong>Nothing matches</strong>
      <p class="text">No item fits ${said || "these times"}. Labels are compared whole, in upper and lower case; items
        without a time are in no range of times.</p>
      <a class="button" href=${href("gallery")}>Show everything</a></div>`;
  }
  return html`<div class="empty"><strong>The gallery is empty</strong>
    <p>Enroll pictures of people, and they can be found.</p>
    <a class="button primary" href=${href("enroll")}>Enroll pictures</a></div>`;
}
