// What is to be enrolled, and its way there: a few at a time, each under a key that makes a repeat
// harmless. It lives beside the view, so that enrolling goes on while others are looked at.
import { ApiError, apiKey, call, formOf, isAborted } from "../api.js";
import { instant, plural } from "../format.js";
import { announce, noteCameras, notePersons } from "../state.js";
import { batch, effect, signal, untracked } from "../ui.js";
import { readPattern } from "./pattern.js";

const AT_ONCE = 4;
const TRIES = 8; // of one file, where the service has too much to do or does not answer
const LONGEST_WAIT = 30; // seconds
const HASHED = 32 << 20; // bytes: larger files are refused anyway

/** [{id, file, path, folder, state: a signal}]; see `State`. */
export const entries = signal([]);
/** How many files were passed over because they are no pictures. */
export const passed = signal(0);
/** What holds for all files: labels, and a pattern of paths that has the last word. */
export const labels = signal({ person: "", camera: "", time: "", modality: "", pattern: "" });
export const running = signal(false);
/** Why enrolling stopped by itself: an ApiError, or null. */
export const stopped = signal(null);
/** Seconds until the service is asked again, 0 where nothing waits; and why: an ApiError. */
export const waiting = signal(0);
export const waitingFor = signal(null);
/** What is wrong with the time that is typed, in a sentence, or null: nothing is sent meanwhile. */
export const timeFault = signal(null);

// State of an entry: {kind, item?, problem?}. Kinds, and how many entries are of each:
const KINDS = ["waiting", "sending", "enrolled", "known", "failed"];
const none = () => Object.fromEntries(KINDS.map((kind) => [kind, 0]));
export const counts = signal(none());

let counter = 0;
let abort = null;
let resumeAt = 0;

function move(entry, state) {
  const next = { ...counts.value };
  next[entry.state.value.kind] -= 1;
  next[state.kind] += 1;
  batch(() => { counts.value = next; entry.state.value = state; });
}

/** Add files, as `sorted` of files.js gives them. */
export function add({ files, passed: others }) {
  const there = new Set(entries.value.map(({ file, path, folder }) => same(file, path, folder)));
  const fresh = files.filter(({ file, path, folder }) => !there.has(same(file, path, folder)));
  batch(() => {
    entries.value = [...entries.value, ...fresh.map((one) => ({
      ...one, id: (counter += 1), sent: null, state: signal({ kind: "waiting" }),
    }))];
    counts.value = { ...counts.value, waiting: counts.value.waiting + fresh.length };
    passed.value += others;
  });
  announce(`${plural(fresh.length, "picture")} chosen`);
}

const same = (file, path, folder) => [folder, path, file.size, file.lastModified].join("\n");

/** Forget the files; what is enrolled stays enrolled. */
export function clear() {
  stop();
  batch(() => {
    entries.value = [];
    counts.value = none();
    passed.value = 0;
    stopped.value = null;
  });
}

/** The pattern as a function of a path, or null without one. Throws an Error that says what is wrong. */
export const matcher = () => (labels.value.pattern.trim() ? readPattern(labels.value.pattern) : null);

/** The labels of a file: its path's, else those of all. null where its path does not fit the pattern. */
export function fieldsOf(entry, match) {
  const { person, camera, time, modality } = labels.value;
  const shared = {
    person_id: person.trim(), camera_id: camera.trim(), captured_at: instant(time), modality,
  };
  if (!match) return shared;
  // Below the folder that was chosen, as on the command line; or with it, for whoever chose one of a
  // single camera.
  const found = match(entry.path) ?? match(`${entry.folder}/${entry.path}`);
  return found && { ...shared, ...found };
}

/** Enroll what waits; failed: what failed before, too. */
export async function start({ failed = false } = {}) {
  if (running.value || timeFault.value) return;
  const match = matcher();
  if (failed) {
    entries.value.filter((entry) => entry.state.value.kind === "failed")
      .forEach((entry) => move(entry, { kind: "waiting" }));
  }
  const todo = entries.value.filter((entry) => entry.state.value.kind === "waiting");
  const own = new AbortController();
  abort = own;
  batch(() => { running.value = true; stopped.value = null; });
  const next = async () => {
    for (let entry; !own.signal.aborted && (entry = todo.shift());) await enroll(entry, match, own);
  };
  await Promise.all(Array.from({ length: AT_ONCE }, next));
  if (abort !== own) return;
  abort = null;
  batch(() => { running.value = false; waiting.value = 0; });
  const { enrolled, known, failed: wrong } = counts.value;
  announce(`${plural(enrolled + known, "picture")} enrolled${wrong ? `, ${wrong} failed` : ""}`);
}

/** Stop; what is on its way may arrive, and is known by its key when it is sent again. */
export function stop() {
  abort?.abort();
  abort = null;
  batch(() => { running.value = false; waiting.value = 0; });
}

async function enroll(entry, match, own) {
  move(entry, { kind: "sending" });
  try {
    if (!entry.sent) {
      const fields = fieldsOf(entry, match);
      if (!fields) throw refused("Path does not fit", "Its path does not fit the pattern; correct the pattern, or remove it.");
      entry.sent = { fields, key: await keyOf(entry.file, fields) };
    }
    const response = await patiently(() => call("gallery", {
      method: "POST",
      form: formOf(entry.sent.fields, [entry.file]),
      headers: { "Idempotency-Key": entry.sent.key },
      signal: own.signal,
    }), own);
    const item = await response.json();
    noteCameras([item.camera_id]);
    notePersons([item.person_id]);
    move(entry, { kind: response.status === 201 ? "enrolled" : "known", item });
  } catch (error) {
    // Also where the error's own body was no longer read: its key makes another try harmless.
    if (isAborted(error) || own.signal.aborted) {
      move(entry, { kind: "waiting" });
      return;
    }
    const problem = error instanceof ApiError ? error
      : refused("Not readable", "The file cannot be read (any more); see that it is there, and choose it again.");
    // Refused for good: nothing was stored, so the next try may bear other labels.
    if (problem.status >= 400 && problem.status < 500 || problem.status === undefined) entry.sent = null;
    if (problem.refused || problem.overloaded || problem.unavailable || problem.code === "storage_full") {
      // No other file would fare better.
      move(entry, { kind: "waiting" });
      stop();
      stopped.value = problem;
    } else move(entry, { kind: "failed", problem });
  }
}

const refused = (title, detail) => new ApiError({ title, detail, code: "not_sent", status: 400 });

/** Make a call until it is answered otherwise than by "later", for as long as the service asks to wait. */
async function patiently(request, own) {
  for (let attempt = 1; ; attempt += 1) {
    await pause(own.signal);
    try {
      return await request();
    } catch (error) {
      const later = error.overloaded || error.unavailable || [502, 504].includes(error.status);
      if (!later || attempt === TRIES) throw error;
      const seconds = Math.min(error.retryAfter ?? 2 ** (attempt - 1), LONGEST_WAIT);
      resumeAt = Math.max(resumeAt, Date.now() + 1000 * seconds);
      waitingFor.value = error;
    }
  }
}

/** Wait until the service may be asked again; all files do. */
async function pause(signal) {
  while (Date.now() < resumeAt) {
    if (signal.aborted) throw new DOMException("stopped", "AbortError");
    waiting.value = Math.ceil((resumeAt - Date.now()) / 1000);
    await new Promise((resolve) => { setTimeout(resolve, Math.min(250, resumeAt - Date.now())); });
  }
  waiting.value = 0;
}

/** The same for the same picture with the same labels, so that no repeat enrolls it twice: neither
 * after a lost answer nor after the folder is dropped again. */
async function keyOf(file, fields) {
  if (globalThis.crypto?.subtle && file.size <= HASHED) { // only where the page came safely
    const said = new TextEncoder().encode(JSON.stringify(Object.entries(fields).filter(([, value]) => value).sort()));
    const bytes = new Uint8Array(await new Blob([said, file]).arrayBuffer());
    return `page-${hex(new Uint8Array(await crypto.subtle.digest("SHA-256", bytes)))}`;
  }
  await file.slice(0, 1).arrayBuffer(); // as above, a file that is gone is noticed before it is sent
  return `page-${hex(crypto.getRandomValues(new Uint8Array(16)))}`;
}

const hex = (bytes) => [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("");

// A new key: what was refused goes on.
effect(() => {
  apiKey.value;
  untracked(() => { if (stopped.value?.refused) start(); });
});
addEventListener("beforeunload", (event) => { if (running.value) event.preventDefault(); });
