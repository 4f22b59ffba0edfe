// A scale of time for drawing: where a moment lies, and which moments to name.

const MINUTE = 60_000, HOUR = 60 * MINUTE, DAY = 24 * HOUR;
const STEPS = [1, 2, 5, 10, 15, 30].map((n) => n * MINUTE)
  .concat([1, 2, 3, 6, 12].map((n) => n * HOUR), [1, 2, 7, 14].map((n) => n * DAY));

const CLOCK = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit" });
const DATE = new Intl.DateTimeFormat(undefined, { day: "numeric", month: "short" });
const MONTH = new Intl.DateTimeFormat(undefined, { month: "short", year: "numeric" });

/** Moments between two, `most` at most, at round local times: [{at, words, day}]. */
export function ticks(from, to, most) {
  const span = Math.max(to - from, MINUTE);
  const step = STEPS.find((one) => span / one <= most);
  if (!step) return months(from, to, Math.ceil(span / (30 * DAY) / most));
  const start = new Date(from);
  start.setHours(0, 0, 0, 0);
  const found = [];
  // By the calendar where a step is days long, so that a change of the clocks moves nothing.
  for (let place = 0; found.length <= most; place += 1) {
    const at = step < DAY ? start.getTime() + place * step
      : new Date(start.getFullYear(), start.getMonth(), start.getDate() + place * (step / DAY)).getTime();
    if (at > to) break;
    const midnight = new Date(at).getHours() === 0 && new Date(at).getMinutes() === 0;
    if (at >= from) found.push({ at, words: step >= DAY || midnight ? DATE.format(at) : CLOCK.format(at), day: midnight });
  }
  return found;
}

function months(from, to, every) {
  const found = [];
  const start = new Date(from);
  for (let place = 1; found.length < 400; place += every) {
    const at = new Date(start.getFullYear(), start.getMonth() + place, 1).getTime();
    if (at > to) break;
    found.push({ at, words: MONTH.format(at), day: false });
  }
  return found;
}

/** A function from moments to places between 0 and `width`, with some air at both ends. */
export function scale(times, width) {
  let from = times.reduce((a, b) => Math.min(a, b)), to = times.reduce((a, b) => Math.max(a, b));
  const air = Math.max((to - from) * 0.03, MINUTE / 2);
  from -= air;
  to += air;
  return { from, to, at: (moment) => ((moment - from) / (to - from)) * width };
}
