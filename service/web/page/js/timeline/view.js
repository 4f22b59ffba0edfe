// Where a person was seen: cameras in rows, time from left to right, and the same as a table.
import { listItems } from "../api.js";
import { Loaded, useLoaded } from "../components/loaded.js";
import { Picture } from "../components/picture.js";
import { MODALITIES, plural, time } from "../format.js";
import { Cards, described } from "../gallery/cards.js";
import { go, href } from "../router.js";
import { announce, noteCameras, notePersons, persons } from "../state.js";
import { html, useEffect, useId, useLayoutEffect, useRef, useState } from "../ui.js";
import { scale, ticks } from "./scale.js";

const MOST = 5000; // items of one person that are fetched
const ROWS = 500; // of the table
const SUGGESTED = 40;

export function TimelineView({ parameters }) {
  const person = parameters.get("person_id") ?? "";
  return html`
    <section class="view">
      <h1>Timeline</h1>
      <${Whose} key=${person} person=${person} />
      ${person ? html`<${Sightings} key=${person} person=${person} />` : html`<${Suggestions} />`}
    </section>`;
}

function Whose({ person }) {
  const id = useId();
  const submit = (event) => {
    event.preventDefault();
    const label = new FormData(event.target).get("person_id").trim();
    go("timeline", "", label ? { person_id: label } : {});
  };
  return html`
    <form class="card padded row whose" role="search" aria-label="Whose timeline" onSubmit=${submit}>
      <label class="field grow"><span>Person</span>
        <input name="person_id" defaultValue=${person} list=${id} maxlength="128" required autocomplete="off" /></label>
      <button type="submit" class="button primary">Show where seen</button>
      <datalist id=${id}>${[...persons.value].sort().map((one) => html`<option key=${one} value=${one} />`)}</datalist>
    </form>`;
}

/** People to begin with: those of the latest answers and lists, or of the gallery's beginning. */
function Suggestions() {
  const loaded = useLoaded(async (options) => {
    if (!persons.value.size) notePersons((await listItems({ limit: 200 }, options)).items.map((item) => item.person_id));
    return true;
  }, []);
  const order = new Intl.Collator("en", { numeric: true });
  const some = [...persons.value].sort(order.compare).slice(0, SUGGESTED);
  return html`<${Loaded} loaded=${loaded} what="people">
    ${some.length
      ? html`<div class="stack"><p class="soft">The cameras that saw a person, and when. Some of the people in the gallery:</p>
          <ul class="row people">${some.map((one) => html`<li key=${one}>
            <a class="chip text" href=${href("timeline", "", { person_id: one })}>${one}</a></li>`)}</ul></div>`
      : html`<div class="empty"><strong>Nobody to show yet</strong>
          <p>A timeline shows enrolled pictures that say whom they show. Enroll some, or give items a person.</p>
          <a class="button" href=${href("enroll")}>Enroll pictures</a></div>`}
  <//>`;
}

async function allOf(person, options) {
  const items = [];
  let cursor = null, total = 0;
  do {
    const found = await listItems({ person_id: person, limit: 1000, cursor }, options);
    items.push(...found.items);
    ({ total, next_cursor: cursor } = found);
  } while (cursor && items.length < MOST);
  noteCameras(items.map((item) => item.camera_id));
  const timed = items.filter((item) => item.captured_at)
    .sort((one, other) => Date.parse(one.captured_at) - Date.parse(other.captured_at));
  const timeless = items.filter((item) => !item.captured_at);
  announce(`Seen ${plural(timed.length, "time")}`);
  return { timed, timeless, total, all: items.length };
}

function Sightings({ person }) {
  const loaded = useLoaded((options) => allOf(person, options), [person]);
  return html`<${Loaded} loaded=${loaded} what="where this person was seen">
    <${Seen} person=${person} ...${loaded.value} /><//>`;
}

function Seen({ person, timed, timeless, total, all }) {
  if (!total) {
    return html`<div class="empty"><strong>Nobody of this name</strong>
      <p class="text">No item has the person <b>${person}</b>. Labels are compared whole, in upper and lower case.</p></div>`;
  }
  const places = new Set(timed.map((item) => item.camera_id));
  const first = timed[0], last = timed.at(-1);
  return html`
    <div class="stack">
      <div class="bar">
        <p class="text" data-testid="summary">${timed.length
          ? html`<b>${plural(timed.length, "sighting")}</b> at ${plural(places.size, "camera")}, from
              ${" "}${time(first.captured_at)} to ${time(last.captured_at)}.`
          : html`<b>No sighting has a time.</b>`}
          ${timeless.length ? ` ${plural(timeless.length, "item has", "items have")} no time.` : ""}</p>
        <a class="button small" href=${href("gallery", "", { person_id: person })}>All pictures</a>
      </div>
      ${all < total && html`<p class="notice warning">Only the first ${plural(all, "item")} of ${total.toLocaleString("en")}
        are shown.</p>`}
      ${timed.length > 0 && html`<${Chart} timed=${timed} /><${Table} timed=${timed} />`}
      ${timeless.length > 0 && html`
        <section class="stack" aria-labelledby="timeless"><h2 id="timeless">Without a time</h2>
          <p class="soft">Seen at some time; correct an item to place it.</p>
          <${Cards} items=${timeless.slice(0, ROWS)} />
          ${timeless.length > ROWS && html`<p class="soft">and ${(timeless.length - ROWS).toLocaleString("en")} more</p>`}
        </section>`}
    </div>`;
}

const LANE = 44, TOP = 28, DOT = 7;
const laneName = (camera) => camera ?? "no camera";

/** How wide an element is, now and after every change. */
function useWidth(frame) {
  const [width, setWidth] = useState(0);
  useLayoutEffect(() => setWidth(frame.current.clientWidth), []);
  useEffect(() => {
    const watching = new ResizeObserver(() => setWidth(frame.current?.clientWidth ?? 0));
    watching.observe(frame.current);
    return () => watching.disconnect();
  }, []);
  return width;
}

/** Sightings that would be drawn over one another, as one: [{items, x, lane}]. */
function dots(timed, lanes, at) {
  const found = [];
  const latest = new Map();
  for (const item of timed) {
    const lane = lanes.indexOf(item.camera_id), x = at(Date.parse(item.captured_at));
    const before = latest.get(lane);
    if (before && x - before.x < DOT) before.items.push(item);
    else {
      const dot = { items: [item], x, lane };
      latest.set(lane, dot);
      found.push(dot);
    }
  }
  return found;
}

// For the eye; whoever does not see it, or has no pointer, has the table below.
function Chart({ timed }) {
  const frame = useRef(null);
  const width = useWidth(frame);
  const order = new Intl.Collator("en", { numeric: true });
  const lanes = [...new Set(timed.map((item) => item.camera_id))]
    .sort((one, other) => (one === null) - (other === null) || order.compare(one, other));
  const { from, to, at } = scale(timed.map((item) => Date.parse(item.captured_at)), Math.max(width, 1));
  const height = TOP + lanes.length * LANE;
  const middle = (lane) => TOP + lane * LANE + LANE / 2 + 8;
  const seen = width ? dots(timed, lanes, at) : [];
  const path = seen.map(({ x, lane }, place) => `${place ? "L" : "M"}${x.toFixed(1)} ${middle(lane)}`).join("");
  return html`
    <figure class="card timeline">
      <div ref=${frame}>
        <svg width=${width} height=${height} aria-hidden="true" data-testid="chart">
          ${ticks(from, to, Math.max(2, Math.floor(width / 90))).map(({ at: moment, words, day }) => html`
            <g key=${moment} class=${day ? "tick day" : "tick"}>
              <line x1=${at(moment)} x2=${at(moment)} y1=${TOP - 6} y2=${height} />
              <text x=${Math.min(Math.max(at(moment), 22), width - 22)} y="16" text-anchor="middle">${words}</text>
            </g>`)}
          ${lanes.map((camera, lane) => html`
            <g key=${lane} class="lane">
              <line x1="0" x2=${width} y1=${middle(lane)} y2=${middle(lane)} />
              <text x="8" y=${middle(lane) - 14}>${shortened(laneName(camera), width)}</text>
            </g>`)}
          <path class="way" d=${path} />
          ${seen.map((dot) => html`<${Dot} key=${dot.items[0].id} ...${dot} y=${middle(dot.lane)} />`)}
        </svg>
      </div>
      <figcaption class="soft">Each dot is a sighting, the line the way between them; <span class="key rgb"></span> visible,
        <span class="key ir"></span> infrared. The table below says the same.</figcaption>
    </figure>`;
}

const shortened = (text, width) => {
  const signs = [...text], most = Math.max(8, Math.floor(width / 16));
  return signs.length > most ? `${signs.slice(0, most).join("")}…` : text;
};

function Dot({ items, x, y }) {
  const [item] = items;
  const words = items.length > 1 ? `${items.length} sightings from ${time(item.captured_at)}` : `${described(item)}, ${time(item.captured_at)}`;
  return html`
    <a href=${href("item", item.id)} tabindex="-1" class=${`dot ${item.modality}`}>
      <title>${words}</title>
      <circle cx=${x} cy=${y} r=${items.length > 1 ? DOT + 2 : DOT} />
      ${items.length > 1 && html`<text x=${x} y=${y + 4} text-anchor="middle">${items.length > 99 ? "+" : items.length}</text>`}
    </a>`;
}

function Table({ timed }) {
  return html`
    <div class="card sightings" tabindex="0" role="region" aria-label="Sightings">
      <table>
        <thead><tr><th scope="col"><span class="visually-hidden">Picture</span></th><th scope="col">Time</th>
          <th scope="col">Camera</th><th scope="col">Modality</th></tr></thead>
        <tbody>${timed.slice(0, ROWS).map((item) => html`
          <tr key=${item.id} data-testid="sighting">
            <td class="sighting-picture"><${Picture} id=${item.id} height=${64} alt="" /></td>
            <td><a href=${href("item", item.id)}>${time(item.captured_at)}</a></td>
            <td class="text">${laneName(item.camera_id)}</td>
            <td>${MODALITIES[item.modality]}</td>
          </tr>`)}</tbody>
      </table>
      ${timed.length > ROWS && html`<p class="soft files-note">and ${(timed.length - ROWS).toLocaleString("en")} more</p>`}
    </div>`;
}
