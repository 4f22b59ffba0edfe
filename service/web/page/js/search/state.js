// What is searched for, how, and what came back: kept while other views are open.
import { ApiError, getImage, getItem, isAborted, query, whenKeyChanges } from "../api.js";
import { instant, personName } from "../format.js";
import { retryFailed } from "../pictures.js";
import { forgetPerson, noteCameras, notePersons } from "../state.js";
import { effect, signal } from "../ui.js";

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

/** What is wrong in fields, by their labels; nothing is searched until it is mended. */
export const faults = signal({});

/** Note what is wrong in a field; null: nothing any more. */
export function noteFault(label, sentence) {
  const { [label]: before, ...others } = faults.value;
  if ((before ?? null) === sentence) return;
  faults.value = sentence ? { ...others, [label]: sentence } : others;
  if (!sentence && problem.value?.code === "not_searched") search();
}

/** Grows when the filters are cleared, along with what is typed in part. */
export const cleared = signal(0);

let wish = null;

/** Begin to set the query, in whatever way → a signal; it aborts where a later way begins. */
export function begin() {
  wish?.abort();
  wish = new AbortController();
  return wish.signal;
}

let running = null;
let timer = null;
let counter = 0;

/** Change options; the query is searched again with them. */
export function change(changes) {
  options.value = { ...options.value, ...changes };
  clearTimeout(timer);
  timer = setTimeout(search, 250);
}

export function clearFilters() {
  cleared.value += 1;
  change(Object.fromEntries(FILTERS.map((name) => [name, PLAIN[name]])));
}

// Object URLs live as long as anything here names them.
const made = new Set();
function urlOf(blob) {
  const url = URL.createObjectURL(blob);
  made.add(url);
  return url;
}
effect(() => {
  [pictures, boxUrl, earlier, answer].forEach((one) => one.value);
  queueMicrotask(sweep); // once all that changes together has changed
});
function sweep() {
  const shown = [{ pictures: pictures.value, boxUrl: boxUrl.value }, ...earlier.value];
  if (answer.value) shown.push({ pictures: answer.value.pictures, boxUrl: answer.value.asked.part });
  const used = new Set(shown.flatMap((one) => [one.boxUrl, ...one.pictures.map((picture) => picture.url)]));
  for (const url of made) {
    if (used.has(url)) continue;
    made.delete(url);
    URL.revokeObjectURL(url);
  }
}

const wrap = (file, item = null) => ({
  key: `picture-${(counter += 1)}`, file, item, url: urlOf(file),
});

// A query that is left can be gone back to.
function remember() {
  if (!pictures.value.length) return;
  const left = { pictures: pictures.value, box: box.value, boxUrl: boxUrl.value, options: options.value };
  earlier.value = [...earlier.value, left].slice(-10);
}

/** Search for these files. more: beside the pictures that are there. turn: of `begin`. */
export function choose(files, { more = false, turn = begin() } = {}) {
  if (turn.aborted) return;
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
  begin();
  const rest = pictures.value.filter((one) => one !== picture);
  if (rest.length) {
    remember();
    show(rest, null, null);
    search();
  } else reset();
}

/** Start over; filters and the prior stay. */
export function reset() {
  begin();
  remember();
  empty();
}

function empty() {
  running?.abort();
  clearTimeout(timer);
  show([], null, null);
  answer.value = problem.value = remark.value = null;
}

/** Search for a part of the one picture; null: all of it. crop: a picture of that part, or null.
 * turn: of `begin`. */
export function searchPart(part, crop, turn = begin()) {
  if (turn.aborted) return;
  remember();
  box.value = part;
  boxUrl.value = crop && urlOf(crop);
  search();
}

const nameOf = (item) => `${personName(item)}, ${item.camera_id ?? "no camera"}`;

/** Search for the person of a gallery item. */
export async function searchLike(item) {
  const turn = begin();
  remark.value = null;
  try {
    const whole = typeof item === "string" ? await getItem(item, { signal: turn }) : item;
    const blob = await getImage(whole.id, null, { signal: turn });
    if (turn.aborted) return;
    remember();
    options.value = { ...options.value, modality: whole.modality, polarity: whole.polarity ?? "" };
    show([wrap(new File([blob], nameOf(whole), { type: blob.type }), whole)], null, null);
    scrollTo({ top: 0 });
    await search();
  } catch (error) {
    if (!turn.aborted && !isAborted(error)) problem.value = error;
  }
}

/** Go back to the query before this one. */
export function goBack() {
  const before = earlier.value.at(-1);
  if (!before) return;
  begin();
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

/** Search with all that is set. Only the latest search's answer counts. */
export async function search() {
  clearTimeout(timer);
  if (!pictures.value.length) return;
  running?.abort();
  const wrong = Object.entries(faults.value).map(([label, sentence]) => `${label}: ${sentence}`);
  if (wrong.length) {
    problem.value = new ApiError({ title: "Not searched", detail: wrong.join(" "), code: "not_searched", status: 400 });
    answer.value = null; // as below
    return;
  }
  const own = new AbortController();
  running = own;
  searching.value = true;
  retryFailed();
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

whenKeyChanges((key) => {
  if (!key) { // what it had fetched goes; what the reader chose stays
    begin();
    running?.abort();
    answer.value = problem.value = remark.value = null;
    leave((picture) => picture.item !== null);
    options.value = { ...options.value, cameraIds: [], excludeCameraIds: [], personIds: [] };
  } else if (problem.value?.refused) search(); // now it may be answered
});

/** Take pictures out of all queries, present and earlier → whether the present one lost any. */
function leave(gone) {
  const rest = (list) => (list.some(gone) ? list.filter((one) => !gone(one)) : list);
  // Boxes are about single pictures, so that what is left of several has none.
  earlier.value = earlier.value.map((one) => ({ ...one, pictures: rest(one.pictures) }))
    .filter((one) => one.pictures.length);
  const left = rest(pictures.value);
  if (left === pictures.value) return false;
  if (left.length) show(left, null, null);
  else empty();
  return true;
}

/** An item was changed or deleted elsewhere: show it so here, and search again, because
 * probabilities are about people. item: null where it is gone. */
export function itemChanged(id, item) {
  const same = (picture) => picture.item?.id === id;
  let touched = running !== null; // its answer may hold the item as it was
  if (item) {
    const anew = new Map(); // an answer's pictures are the query's very list
    const renamed = (list) => {
      if (!list.some(same)) return list;
      if (!anew.has(list)) {
        anew.set(list, list.map((one) => (same(one)
          ? { ...one, item, file: new File([one.file], nameOf(item), { type: one.file.type }) } : one)));
      }
      return anew.get(list);
    };
    pictures.value = renamed(pictures.value);
    earlier.value = earlier.value.map((one) => ({ ...one, pictures: renamed(one.pictures) }));
    if (answer.value) answer.value = { ...answer.value, pictures: renamed(answer.value.pictures) };
  } else {
    if (leave(same)) touched = true;
    if (answer.value?.pictures.some(same)) answer.value = null;
  }
  if (answer.value?.body.results.some((result) => result.item.id === id)) {
    touched = true;
    const results = answer.value.body.results
      .map((result) => (result.item.id === id ? item && { ...result, item } : result))
      .filter(Boolean);
    answer.value = { ...answer.value, body: { ...answer.value.body, results } };
  }
  if (touched) change({});
}

/** All items of a person were erased: also those that only this view knows. */
export function personErased(personId) {
  const known = [
    ...pictures.value, ...earlier.value.flatMap((one) => one.pictures), ...(answer.value?.body.results ?? []),
  ].map((one) => one.item).filter((item) => item?.person_id === personId);
  for (const id of new Set(known.map((item) => item.id))) itemChanged(id, null);
  forgetPerson(personId);
}
