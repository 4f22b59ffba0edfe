// What is searched for, how, and what came back: kept while other views are open.
import { apiKey, getImage, getItem, isAborted, query } from "../api.js";
import { personName } from "../format.js";
import { noteCameras, notePersons } from "../state.js";
import { effect, signal, untracked } from "../ui.js";

export const MOST_IMAGES = 16;

/** Pictures of the person asked for: [{key, file, url, item}]; item: where it is an enrolled one. */
export const pictures = signal([]);
/** The part of the one picture that shows the person, {x, y, width, height} in pixels, or null. */
export const box = signal(null);
/** An object URL of that part, or null. */
export const boxUrl = signal(null);
/** A sentence about what was chosen, or null. */
export const remark = signal(null);

const PLAIN = {
  modality: "", // "": detect
  polarity: "",
  queryCamera: "",
  prior: null, // null: as GET /model says
  modulation: true,
  rerank: "", // "": as the checkpoint says
  grouped: false,
  exhaustive: false,
  topK: 20,
  cameraIds: [],
  excludeCameraIds: [],
  personIds: [],
  galleryModality: "",
  capturedFrom: "",
  capturedTo: "",
};
export const options = signal({ ...PLAIN });
const FILTERS = ["cameraIds", "excludeCameraIds", "personIds", "galleryModality", "capturedFrom", "capturedTo"];

/** How many filters are set. */
export const filterCount = () => FILTERS.filter((name) => options.value[name].length > 0).length;

/** The latest answer and what was asked for it: {body, asked, pictures}, or null. */
export const answer = signal(null);
export const problem = signal(null);
export const searching = signal(false);

/** Queries before this one, to go back to. */
export const earlier = signal([]);

let running = null;
let timer = null;
let counter = 0;

/** Change options; the query is searched again with them. */
export function change(changes) {
  options.value = { ...options.value, ...changes };
  clearTimeout(timer);
  timer = setTimeout(search, 250);
}

export const clearFilters = () => change(Object.fromEntries(FILTERS.map((name) => [name, PLAIN[name]])));

const wrap = (file, item = null) => ({
  key: `picture-${(counter += 1)}`, file, item, url: URL.createObjectURL(file),
});

// A query that is left can be gone back to, so its URLs live on; the oldest ones go.
function remember() {
  if (!pictures.value.length) return;
  const kept = [...earlier.value, { pictures: pictures.value, box: box.value, boxUrl: boxUrl.value, options: options.value }];
  while (kept.length > 10) {
    const dropped = kept.shift();
    const used = new Set([...kept.flatMap((one) => one.pictures), ...pictures.value].map((one) => one.url));
    dropped.pictures.forEach((one) => { if (!used.has(one.url)) URL.revokeObjectURL(one.url); });
  }
  earlier.value = kept;
}

/** Search for these files. more: beside the pictures that are there. */
export function choose(files, { more = false } = {}) {
  const there = more ? pictures.value : [];
  const room = MOST_IMAGES - there.length;
  const taken = [...files].slice(0, Math.max(0, room));
  remark.value = files.length > room
    ? `A query takes at most ${MOST_IMAGES} pictures of one person; ${files.length - taken.length} were left out.`
    : null;
  if (!taken.length) return;
  remember();
  // What was said of the pictures before does not hold for these.
  if (!more) options.value = { ...options.value, modality: "", polarity: "" };
  show([...there, ...taken.map((file) => wrap(file))], null, null);
  search();
}

function show(next, nextBox, nextUrl) {
  pictures.value = next;
  box.value = nextBox;
  boxUrl.value = nextUrl;
}

/** Leave out one picture of the query. */
export function drop(picture) {
  const rest = pictures.value.filter((one) => one !== picture);
  if (rest.length) {
    remember();
    show(rest, null, null);
    search();
  } else reset();
}

/** Start over; filters and the prior stay. */
export function reset() {
  remember();
  running?.abort();
  clearTimeout(timer);
  show([], null, null);
  answer.value = problem.value = remark.value = null;
}

/** Search for a part of the one picture; null: all of it. url: a picture of that part. */
export function searchPart(part, url) {
  remember();
  box.value = part;
  boxUrl.value = url;
  search();
}

/** Search for the person of a gallery item. */
export async function searchLike(item) {
  remark.value = null;
  try {
    const whole = typeof item === "string" ? await getItem(item) : item;
    const blob = await getImage(whole.id);
    remember();
    options.value = { ...options.value, modality: whole.modality, polarity: whole.polarity ?? "" };
    const name = `${personName(whole)}, ${whole.camera_id ?? "no camera"}`;
    show([wrap(new File([blob], name, { type: blob.type }), whole)], null, null);
    scrollTo({ top: 0 });
    await search();
  } catch (error) {
    if (!isAborted(error)) problem.value = error;
  }
}

/** Go back to the query before this one. */
export function goBack() {
  const before = earlier.value.at(-1);
  if (!before) return;
  earlier.value = earlier.value.slice(0, -1);
  options.value = before.options;
  show(before.pictures, before.box, before.boxUrl);
  search();
}

/** The fields of POST /query that the options stand for. */
export function fields() {
  const chosen = options.value, part = box.value;
  return {
    query_camera_id: chosen.queryCamera,
    modality: chosen.modality,
    polarity: chosen.modality === "rgb" ? "" : chosen.polarity,
    box: part && [part.x, part.y, part.width, part.height].join(","),
    top_k: chosen.topK,
    exhaustive: chosen.exhaustive,
    modulation: chosen.modulation,
    rerank: chosen.rerank,
    prior: chosen.prior,
    group_by: chosen.grouped ? "person_id" : "",
    person_id: chosen.personIds,
    camera_id: chosen.cameraIds,
    exclude_camera_id: chosen.excludeCameraIds,
    gallery_modality: chosen.galleryModality,
    captured_from: instant(chosen.capturedFrom),
    captured_to: instant(chosen.capturedTo),
    explain: true,
  };
}

const instant = (local) => (local ? new Date(local).toISOString() : "");

/** Search with all that is set. Only the latest search's answer counts. */
export async function search() {
  clearTimeout(timer);
  if (!pictures.value.length) return;
  running?.abort();
  const own = new AbortController();
  running = own;
  searching.value = true;
  problem.value = null;
  const asked = { ...options.value, box: box.value, part: boxUrl.value };
  const used = pictures.value;
  try {
    const started = performance.now();
    const body = await query(used.map((one) => one.file), fields(), { signal: own.signal });
    if (running !== own) return;
    answer.value = { body, asked, pictures: used, ms: performance.now() - started };
    noteCameras(body.results.map((result) => result.item.camera_id));
    notePersons(body.results.map((result) => result.item.person_id));
  } catch (error) {
    if (running !== own || isAborted(error)) return;
    problem.value = error;
    answer.value = null; // an older answer beside an error would be taken for this query's
  } finally {
    if (running === own) { running = null; searching.value = false; }
  }
}

// A new key: what was refused is asked again.
effect(() => {
  apiKey.value;
  untracked(() => { if (problem.value?.refused) search(); });
});

/** An item was changed or deleted elsewhere: show it so here, and search again, because
 * probabilities are about people. item: null where it is gone. */
export function itemChanged(id, item) {
  if (!answer.value?.body.results.some((result) => result.item.id === id)) return;
  const results = answer.value.body.results
    .map((result) => (result.item.id === id ? item && { ...result, item } : result))
    .filter(Boolean);
  answer.value = { ...answer.value, body: { ...answer.value.body, results } };
  change({});
}
