// All HTTP of the page: the key, errors as the service words them, and its verbs. Views call these
// and never fetch().
import { effect, signal, untracked } from "./ui.js";

const ROOT = new URL("../../", import.meta.url); // where the service lives, under any root path
const STORED = "cmt-key";

function storedKey() {
  try {
    const stored = sessionStorage.getItem(STORED) ?? "";
    return keyFault(stored) ? "" : stored;
  } catch { return ""; }
}

/** What no key has, in a sentence, or null. fetch() throws where a header holds such characters. */
export function keyFault(text) {
  const [strange] = text.trim().match(/[^\x21-\x7e]/u) ?? [];
  if (strange === undefined) return null;
  const code = `U+${strange.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;
  const shown = /[\p{L}\p{N}\p{P}\p{S}]/u.test(strange) ? `the character “${strange}”` : `spaces or the like (${code})`;
  return `No key has ${shown}; copy the key as it was given to you.`;
}

/** The API key, kept for this tab only; empty where there is none. */
export const apiKey = signal(storedKey());

/** Why a key is asked for: the problem of the latest call that was refused, or null. */
export const keyWanted = signal(null);

/** Call `then(key)` each time the key becomes another one; "" where it is forgotten. */
export function whenKeyChanges(then) {
  let last = apiKey.peek();
  effect(() => {
    const before = last;
    last = apiKey.value;
    if (last !== before) untracked(() => then(last));
  });
}

/** Use a key from now on; empty forgets it. */
export function useKey(text) {
  apiKey.value = text.trim();
  keyWanted.value = null;
  try {
    if (apiKey.value) sessionStorage.setItem(STORED, apiKey.value);
    else sessionStorage.removeItem(STORED);
  } catch { /* storage is off: the key lives as long as the page */ }
}

/** What went wrong, as the service says it (RFC 9457).
 *
 * title, detail: for people; detail names the remedy. code: stable. status: 0 where nothing
 * answered. retryAfter: seconds, or null. fields: [{name, detail}] of wrong parameters.
 */
export class ApiError extends Error {
  constructor({ title, detail, code, status = 0, retryAfter = null, fields = [] }) {
    super(detail);
    Object.assign(this, { title, detail, code, status, retryAfter, fields });
  }
  /** More requests than the service takes at the moment. */
  get overloaded() { return this.status === 429; }
  /** The service, or something it needs, is not there at the moment. */
  get unavailable() { return this.status === 503 || this.status === 0; }
  /** Another key is needed. */
  get refused() { return this.status === 401 || this.code === "scope_missing"; }
}

/** Whether an error is only that its caller no longer wants the answer. */
export const isAborted = (error) => error?.name === "AbortError";

async function problemOf(response) {
  const after = Number.parseInt(response.headers.get("Retry-After") ?? "", 10);
  const retryAfter = Number.isFinite(after) ? after : null;
  let body = null;
  try { body = await response.json(); } catch { /* a proxy's own page */ }
  if (typeof body?.detail !== "string") {
    body = {
      title: `Error ${response.status}`,
      code: "http_error",
      detail: `Something between this page and the service answered ${response.status}; `
        + "try again, or ask whoever runs it.",
    };
  }
  return new ApiError({
    ...body, status: response.status, retryAfter, fields: body.errors ?? [],
  });
}

/** Call the service → its Response. Raises ApiError, or AbortError where `signal` aborts.
 *
 * path: from the root, without a slash before it; parts that are data are encoded by the caller.
 * query: parameters; a list repeats one, null and "" leave it out. quiet: no dialog opens where the
 * key may not do this, because nobody has asked for it.
 */
export async function call(path, { method = "GET", query = {}, form, json, signal: abort, headers = {}, quiet = false } = {}) {
  const url = new URL(path, ROOT);
  for (const [name, value] of Object.entries(query)) {
    for (const one of Array.isArray(value) ? value : [value]) {
      if (one !== null && one !== undefined && one !== "") url.searchParams.append(name, one);
    }
  }
  const sent = { ...headers };
  if (apiKey.value) sent.Authorization = `Bearer ${apiKey.value}`;
  if (json !== undefined) sent["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(url, {
      method, headers: sent, signal: abort, body: json === undefined ? form : JSON.stringify(json),
    });
  } catch (error) {
    if (isAborted(error)) throw error;
    throw new ApiError({
      title: "No answer",
      code: "unreachable",
      detail: "The service does not answer; see that it is running and reachable, then try again.",
    });
  }
  if (response.ok) return response;
  const problem = await problemOf(response);
  if (problem.refused && !(quiet && problem.status === 403)) keyWanted.value = problem;
  throw problem;
}

async function data(...given) {
  const response = await call(...given);
  try {
    return await response.json();
  } catch (error) {
    if (isAborted(error)) throw error;
    throw new ApiError({
      title: "Not the service's answer",
      code: "http_error",
      status: 502,
      detail: "Something between this page and the service answered in its place, or cut the answer "
        + "short; try again, or ask whoever runs it.",
    });
  }
}

const ID = /^[0-9a-f]{8}-?([0-9a-f]{4}-?){3}[0-9a-f]{12}$/i;

/** The path of an item. Raises ApiError where its id is none, since ".." would lead elsewhere. */
function itemPath(id) {
  if (ID.test(id)) return `gallery/${id}`;
  throw new ApiError({
    title: "Item not found",
    code: "item_not_found",
    status: 404,
    detail: "No item has this address; open one from the gallery.",
  });
}

/** A form from fields: lists repeat a field; null, undefined and "" leave it out. */
export function formOf(fields, images = []) {
  const form = new FormData();
  for (const image of images) form.append("image", image, image.name || "image");
  for (const [name, value] of Object.entries(fields)) {
    for (const one of Array.isArray(value) ? value : [value]) {
      if (one !== null && one !== undefined && one !== "") form.append(name, String(one));
    }
  }
  return form;
}

export const getModel = (options) => data("model", options);
export const getCameras = async (options) => (await data("cameras", options)).cameras;
export const query = (images, fields, options) =>
  data("query", { ...options, method: "POST", form: formOf(fields, images) });
export const listItems = (filters, options) => data("gallery", { ...options, query: filters });
export const getItem = async (id, options) => data(itemPath(id), options);
export const patchItem = async (id, changes, options) =>
  data(itemPath(id), { ...options, method: "PATCH", json: changes });
export const deleteItem = async (id, options) => call(itemPath(id), { ...options, method: "DELETE" });
export const erasePerson = (personId, options) =>
  data("gallery", { ...options, method: "DELETE", query: { person_id: personId } });
/** Enroll one image. key: makes a repeat harmless. */
export const enroll = (image, fields, key, options) =>
  data("gallery", {
    ...options, method: "POST", form: formOf(fields, [image]), headers: key ? { "Idempotency-Key": key } : {},
  });
/** The stored crop as a Blob; with a height, its JPEG thumbnail (64 to 512). */
export const getImage = async (id, height, options) =>
  (await call(`${itemPath(id)}/image`, { ...options, query: { height } })).blob();
