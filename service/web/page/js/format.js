// Numbers and times in words, the same in every view.

/** A probability for people, who would take 100% for certain. */
export function percent(p) {
  if (p === null || p === undefined) return "–";
  if (p === 0 || p === 1) return `${p * 100}%`;
  if (p < 0.01) return "<1%";
  return p > 0.99 ? ">99%" : `${Math.round(p * 100)}%`;
}

/** A share that a person gave, with all of its digits. */
export const exactPercent = (p) =>
  (p === null || p === undefined ? "–" : `${Number((100 * p).toPrecision(10))}%`);

export const decimal = (value, digits = 3) =>
  value === null || value === undefined ? "–" : value.toFixed(digits);

export const plural = (count, one, many = `${one}s`) =>
  `${count.toLocaleString("en")} ${count === 1 ? one : many}`;

export const MODALITIES = { rgb: "visible", ir: "infrared", mixed: "visible and infrared" };

const TIME_PARTS = {
  year: "numeric", month: "short", day: "numeric", hour: "2-digit", minute: "2-digit", second: "2-digit",
};
const TIME = new Intl.DateTimeFormat(undefined, TIME_PARTS);
/** A time in the reader's own time zone, or a dash. */
export const time = (text) => (text ? TIME.format(new Date(text)) : "–");

const ZONED = new Intl.DateTimeFormat(undefined, { ...TIME_PARTS, timeZoneName: "longOffset" });
/** The same with its zone, for what is read elsewhere. */
export const zonedTime = (text) => (text ? ZONED.format(new Date(text)) : "–");

/** What <input type="datetime-local"> holds, as the service wants it, with the zone's offset. What is
 * no time stays as it is: the service says what is wrong with it. */
export function instant(local) {
  const moment = new Date(local);
  return Number.isNaN(moment.getTime()) ? local : moment.toISOString();
}

/** Who an item shows, in words. */
export const personName = (item) =>
  item.person_id === null ? "unlabelled" : `person ${item.person_id}`;
