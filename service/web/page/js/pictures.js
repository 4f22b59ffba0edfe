// Pictures of gallery items as object URLs. They are fetched, not linked, because an <img> cannot
// send the key. A small cache keeps what was seen lately; what it drops is revoked, unless it is
// still on the screen.
import { getImage, whenKeyChanges } from "./api.js";
import { signal } from "./ui.js";

const KEPT = 400; // thumbnails of a few kilobytes each
const AT_ONCE = 6; // as many connections as a browser opens to one host

/** Grows when pictures that failed are worth another try. */
export const attempt = signal(0);
/** Try again what failed: after a search, a retry, or once the network is back. */
export const retryFailed = () => { attempt.value += 1; };
addEventListener("online", retryFailed);

const PATIENCE = 3; // times that a picture is asked for where the service is overloaded

/** An item's picture as a Blob, asked for again where the service has too much to do. */
export async function patiently(id, height, options) {
  for (let left = PATIENCE; ; left -= 1) {
    try {
      return await getImage(id, height, options);
    } catch (error) {
      if (left <= 1 || !(error.overloaded || error.status === 503)) throw error;
      await new Promise((resolve) => { setTimeout(resolve, 1000 * Math.min(error.retryAfter ?? 1, 10)); });
    }
  }
}

const entries = new Map(); // key → {url: Promise<string>, users, dead}; oldest use first
const waiting = [];
let running = 0;

function next() {
  while (running < AT_ONCE && waiting.length) {
    // Whoever scrolls past many pictures looks at the latest ones.
    const { entry, run } = waiting.length > 40 ? waiting.pop() : waiting.shift();
    if (entry.users === 0) { entry.cancel(); continue; }
    running += 1;
    run().finally(() => { running -= 1; next(); });
  }
}

function load(key, id, height) {
  const entry = { users: 0, cancel: () => {} };
  entry.url = new Promise((resolve, reject) => {
    entry.cancel = () => {
      if (entries.get(key) === entry) entries.delete(key);
      reject(new DOMException("no longer wanted", "AbortError"));
    };
    const run = () => patiently(id, height).then(
      (blob) => resolve(URL.createObjectURL(blob)),
      (error) => { if (entries.get(key) === entry) entries.delete(key); reject(error); },
    );
    waiting.push({ entry, run });
  });
  entry.url.catch(() => {});
  entries.set(key, entry);
  return entry;
}

function trim() {
  for (const [key, entry] of entries) {
    if (entries.size <= KEPT) return;
    if (entry.users > 0) continue;
    entries.delete(key);
    entry.url.then(URL.revokeObjectURL, () => {});
  }
}

/** Borrow an item's picture → {url: Promise of an object URL, release()}. */
export function borrow(id, height = null) {
  const key = `${id} ${height ?? ""}`;
  const entry = entries.get(key) ?? load(key, id, height);
  entries.delete(key);
  entries.set(key, entry); // the latest use comes last
  entry.users += 1;
  next();
  let held = true;
  return {
    url: entry.url,
    release() {
      if (!held) return;
      held = false;
      entry.users -= 1;
      trim();
    },
  };
}

function dropWhere(chosen) {
  for (const [key, entry] of [...entries]) {
    if (!chosen(key)) continue;
    entries.delete(key);
    entry.url.then(URL.revokeObjectURL, () => {});
  }
}

/** Forget the pictures of an item that was deleted. */
export const forget = (id) => dropWhere((key) => key.startsWith(`${id} `));

whenKeyChanges(() => dropWhere(() => true)); // another key may not see them
