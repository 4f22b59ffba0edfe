// Enrolling: choose files or folders, say what holds for them, and see what became of each.
import { Icon } from "../components/icons.js";
import { Picture } from "../components/picture.js";
import { Problem, said } from "../components/problem.js";
import { TimeField } from "../components/time_field.js";
import { MODALITIES, plural, time } from "../format.js";
import { href } from "../router.js";
import { cameras, persons } from "../state.js";
import { html, useEffect, useId, useState } from "../ui.js";
import { chosen, dropped, sorted } from "./files.js";
import {
  add, clear, counts, entries, fieldsOf, labels, matcher, passed, running, start, stop, stopped, timeFault, waiting,
  waitingFor,
} from "./queue.js";

const ROWS = 200; // drawn at once
const ACCEPTED = "image/jpeg,image/png,image/webp,image/bmp,image/tiff,.tif,.tiff";
const WORDS = {
  waiting: "not sent yet", sending: "sending …", enrolled: "enrolled", known: "was enrolled already", failed: "failed",
};
const FILTERS = [["all", "All"], ["failed", "Failed"], ["waiting", "Not sent"], ["enrolled", "Enrolled"]];
const kindsOf = { failed: ["failed"], waiting: ["waiting", "sending"], enrolled: ["enrolled", "known"] };

export function EnrollView() {
  return html`
    <section class="view">
      <h1>Enroll</h1>
      <div class="enroll">
        <div class="stack enroll-side">
          <${Choose} />
          <${Labels} />
        </div>
        <div class="stack enroll-main">
          <${Progress} />
          <${Files} />
        </div>
      </div>
    </section>`;
}

function Choose() {
  const [over, setOver] = useState(false);
  const [reading, setReading] = useState(false);
  useEffect(() => {
    // Anywhere in the window: else the browser would open the file in place of the page.
    const held = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
    const hold = (event) => { if (held(event)) { event.preventDefault(); setOver(true); } };
    const leave = (event) => { if (!event.relatedTarget) setOver(false); };
    const take = async (event) => {
      if (!held(event)) return;
      event.preventDefault();
      setOver(false);
      setReading(true);
      try { add(sorted(await dropped(event.dataTransfer))); } finally { setReading(false); }
    };
    const listeners = { dragenter: hold, dragover: hold, dragleave: leave, drop: take };
    for (const [name, listener] of Object.entries(listeners)) addEventListener(name, listener);
    return () => {
      for (const [name, listener] of Object.entries(listeners)) removeEventListener(name, listener);
    };
  }, []);
  const pick = (event) => {
    add(sorted(chosen(event.target.files)));
    event.target.value = ""; // the same files may be chosen again
  };
  return html`
    <div class="card padded stack">
      <div class=${`drop ${over ? "drop-over" : ""}`}>
        <${Icon} name="upload" size=${28} />
        <p><strong>Drop pictures or folders here</strong></p>
        <p class="soft">One person on each: JPEG, PNG, WebP, BMP or TIFF.</p>
        <div class="row">
          <label class="button file">Choose pictures
            <input type="file" multiple accept=${ACCEPTED} onChange=${pick} /></label>
          <label class="button file">Choose a folder
            <input type="file" webkitdirectory onChange=${pick} /></label>
        </div>
        ${reading && html`<p class="soft" role="status">Reading the folder …</p>`}
      </div>
    </div>`;
}

function Labels() {
  const id = useId();
  const { person, camera, time, modality, pattern } = labels.value;
  const set = (name) => (event) => { labels.value = { ...labels.value, [name]: event.target.value }; };
  const busy = running.value;
  return html`
    <fieldset class="card padded stack" disabled=${busy}>
      <legend class="visually-hidden">For all files</legend>
      <h2>For all files</h2>
      <label class="field"><span>Person</span>
        <input value=${person} onInput=${set("person")} list=${`${id}p`} maxlength="128" placeholder="unlabelled" autocomplete="off" /></label>
      <label class="field"><span>Camera</span>
        <input value=${camera} onInput=${set("camera")} list=${`${id}c`} maxlength="128" placeholder="no camera" autocomplete="off" /></label>
      <${TimeField} label="Captured" name="captured_at" value=${time}
        onTime=${(text) => { labels.value = { ...labels.value, time: text }; }}
        onFault=${(sentence) => { timeFault.value = sentence; }} />
      <label class="field"><span>Modality</span>
        <select value=${modality} onChange=${set("modality")}>
          <option value="">camera's default, else detected</option>
          <option value="auto">detected</option><option value="rgb">visible</option><option value="ir">infrared</option>
        </select></label>
      <label class="field"><span>Labels from paths</span>
        <input value=${pattern} onInput=${set("pattern")} placeholder="{camera}/{person}/*.jpg" spellcheck=${false}
          autocomplete="off" autocapitalize="off" aria-describedby=${`${id}h`} /></label>
      <p class="soft" id=${`${id}h`}>{person}, {camera}, {time} and {modality} are taken from the path below the folder; * is any text,
        ** any folders.</p>
      <${Preview} />
      <datalist id=${`${id}p`}>${[...persons.value].sort().map((one) => html`<option key=${one} value=${one} />`)}</datalist>
      <datalist id=${`${id}c`}>${[...cameras.value].sort().map((one) => html`<option key=${one} value=${one} />`)}</datalist>
    </fieldset>`;
}

/** What is wrong with the pattern, or null. */
function mistake() {
  try { matcher(); } catch (error) { return error.message; }
  return null;
}

const shownAs = (name, value) =>
  (name === "captured_at" && !Number.isNaN(Date.parse(value)) ? time(value) : MODALITIES[value] ?? value);

/** What the labels come to for the first file that waits. */
function Preview() {
  const wrong = mistake();
  if (wrong) return html`<p class="fault text" role="alert">${wrong}</p>`;
  const match = matcher();
  if (!match || running.value) return null; // which would look at all files whenever one is done
  const open = entries.value.filter((entry) => entry.state.value.kind !== "enrolled" && entry.state.value.kind !== "known");
  if (!open.length) return null;
  const misfits = open.filter((entry) => !fieldsOf(entry, match)).length;
  const fits = open.find((entry) => fieldsOf(entry, match));
  const said = fits && Object.entries(fieldsOf(fits, match)).filter(([, value]) => value);
  return html`
    ${fits && html`<p class="soft text" data-testid="preview"><code>${fits.path}</code>: ${said.map(([name, value], place) =>
      html`${place ? ", " : ""}${name.replace(/_id$|_at$/, "")} <b>${shownAs(name, value)}</b>`)}</p>`}
    ${misfits > 0 && html`<p class="fault">${plural(misfits, "path does", "paths do")} not fit the pattern.</p>`}`;
}

/** Why the service is waited for, as the beginning of a sentence. */
function reason(error) {
  if (error?.overloaded) return "The service has more to do than it can take";
  return error?.code === "unreachable" ? "The service does not answer" : "The service is not ready";
}

function Progress() {
  const { waiting: open, sending, enrolled, known, failed } = counts.value;
  const total = entries.value.length;
  if (!total) return null;
  const done = enrolled + known + failed;
  const busy = running.value;
  const wrong = mistake() !== null || timeFault.value !== null;
  return html`
    <div class="card padded stack">
      <div class="row">
        ${busy
          ? html`<button type="button" class="button" onClick=${stop}>Stop</button>`
          : html`
            ${open > 0 && html`<button type="button" class="button primary" disabled=${wrong} onClick=${() => start()}>
              ${done ? "Go on" : `Enroll ${plural(open, "picture")}`}</button>`}
            ${failed > 0 && html`<button type="button" class="button" disabled=${wrong} onClick=${() => start({ failed: true })}>
              Try ${plural(failed, "failed one")} again</button>`}
            <button type="button" class="button" onClick=${clear}>Clear the list</button>`}
        ${!busy && enrolled + known > 0 && html`<a class="button quiet" href=${href("gallery")}>To the gallery</a>`}
      </div>
      <progress max=${total} value=${done} aria-label="Enrolled so far"></progress>
      <p data-testid="progress"><b>${(enrolled + known).toLocaleString("en")}</b> of ${plural(total, "picture")} enrolled${
        known ? ` (${known} were already)` : ""}${failed ? html`, <b class="fault">${failed} failed</b>` : ""}${
        sending && busy ? `, ${sending} on their way` : ""}.</p>
      ${waiting.value > 0 && html`<p class="soft" role="status">${reason(waitingFor.value)}; going on in
        ${" "}${waiting.value} s.</p>`}
      ${stopped.value && html`<${Problem} error=${stopped.value} onRetry=${() => start()} />`}
    </div>`;
}

function Files() {
  const [filter, setFilter] = useState("all");
  const total = entries.value.length;
  if (!total) {
    return html`<div class="empty"><strong>Nothing chosen yet</strong>
      <p>Choose or drop pictures of people, say who they are if you know, and press Enroll.</p>
      ${passed.value > 0 && html`<p>${plural(passed.value, "file")} passed over: no pictures, or made by other programs.</p>`}</div>`;
  }
  counts.value; // drawn again when one goes from kind to kind
  const shown = filter === "all" ? entries.value
    : entries.value.filter((entry) => kindsOf[filter].includes(entry.state.value.kind));
  const many = (name) => (name === "all" ? total : kindsOf[name].reduce((sum, kind) => sum + counts.value[kind], 0));
  return html`
    <div class="card">
      <div class="row files-bar" role="group" aria-label="Show">
        ${FILTERS.map(([name, words]) => html`<button type="button" key=${name} class="button small"
          aria-pressed=${filter === name} onClick=${() => setFilter(name)}>${words} ${many(name).toLocaleString("en")}</button>`)}
      </div>
      ${passed.value > 0 && html`<p class="soft files-note">${plural(passed.value, "file")} passed over: no pictures, or made by other programs.</p>`}
      <ul class="files">${shown.slice(0, ROWS).map((entry) => html`<${Row} key=${entry.id} entry=${entry} />`)}</ul>
      ${shown.length > ROWS && html`<p class="soft files-note">and ${plural(shown.length - ROWS, "more", "more")}</p>`}
      ${!shown.length && html`<p class="soft files-note">None.</p>`}
    </div>`;
}

function Row({ entry }) {
  const { kind, item, problem } = entry.state.value;
  const name = entry.folder ? `${entry.folder}/${entry.path}` : entry.path;
  return html`
    <li class=${`file-row ${kind}`} data-testid="file" data-kind=${kind}>
      <span class="file-picture">${item && html`<${Picture} id=${item.id} height=${64} alt="" />`}</span>
      <span class="file-words">
        <span class="text">${item ? html`<a href=${href("item", item.id)}>${name}</a>` : name}</span>
        ${problem && html`<span class="fault text">${problem.title}: ${said(problem)}</span>`}
        ${item && html`<span class="soft text">${[item.person_id ?? "unlabelled", item.camera_id ?? "no camera"].join(" · ")}</span>`}
      </span>
      <span class="file-state">${WORDS[kind]}</span>
    </li>`;
}
