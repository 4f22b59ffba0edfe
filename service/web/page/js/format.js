// Numbers and times in words, the same in every view.

/** A probability for people, who would take 100% for certain. */
export function percent(p) {
  if (p === null || p === undefined) return "–";
  if (p === 0 || p === 1) return `${p * 100}%`;
  if (p < 0.01) return "<1%";
  return p > 0.99 ? ">99%" : `${Math.round(p * 100)}%`;
}

export const decimal = (value, digits = 3) =>
  value === null || value === undefined ? "–" : value.toFixed(digits);

export const plural = (count, one, many = `${one}s`) =>
  `${count.toLocaleString("en")} ${count === 1 ? one : many}`;

export const MODALITIES = { rgb: "visible", ir: "infrared", mixed: "visible and infrared" };

const TIME = new Intl.DateTimeFormat(undefined, {
  year: "numeric", month: "short", day: "numeric", hour: "2-digit", minute: "2-digit", second: "2-digit",
});
/** A time in the reader's own time zone, or a dash. */
export const time = (text) => (text ? TIME.format(new Date(text)) : "–");

/** What <input type="datetime-local"> holds, as the service wants it, with the zone's offset. */
export const instant = (local) => (local ? new Date(local).toISOString() : "");

/** Who an item shows, in words. */
export const personName = (item) =>
  item.person_id === null ? "unlabelled" : `person ${item.person_id}`;
