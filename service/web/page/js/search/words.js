// What an answer says, in words that follow its `match`. Nothing here touches the screen, so that
// the page and the exported files say the same.
import { decimal, exactPercent, percent, plural } from "../format.js";

const STANDS_OUT = 0.1; // below it a name in the headline would say more than the answer does

/** An answer in words: {kind, title, figure, whole, notes}.
 *
 * kind: "likely", "possible", "none", or "unknown" where the checkpoint has no probabilities.
 * figure: the probability, as a short sentence. whole: that the person is enrolled at all.
 */
export function headline(body) {
  const { match, probability_enrolled: enrolled, searched, people, results } = body;
  const first = results[0];
  if (!searched) {
    return {
      kind: "none", title: "Probably not enrolled: nothing was searched", figure: "", whole: "", notes: [],
    };
  }
  const name = first && (first.item.person_id === null
    ? "the unlabelled person of result 1" : `person ${first.item.person_id}`);
  if (match === null) {
    return {
      kind: "unknown",
      title: first ? `Nearest: ${name}` : "Nothing was near enough",
      figure: first ? closeness(first) : "",
      whole: "",
      notes: ["The checkpoint in use gives no probabilities for this kind of search. The order says "
        + "who looks most alike, not whether the person is enrolled."],
    };
  }
  const among = people === 1 ? "That it is the only person searched"
    : `That the person is among the ${plural(people, "person", "people")} searched at all`;
  const whole = `${among}: ${percent(enrolled)}`;
  if (match === "none" || !first) {
    return { kind: match, title: "Probably not enrolled", figure: "", whole, notes: [] };
  }
  return {
    kind: match,
    title: `${match === "likely" ? "Likely" : "Possibly"} ${name}`,
    figure: `probability ${percent(first.probability)}`,
    whole,
    notes: [
      ...(first.probability < STANDS_OUT ? [`Nobody stands out: the first of them is only ${percent(first.probability)} probable`] : []),
      ...runnersUp(results),
    ],
  };
}

/** How alike a result is where there is no probability. */
export const closeness = (result) => (result.similarity === null
  ? `distance ${decimal(result.distance)}` : `similarity ${decimal(result.similarity)}`);

// Who else it may be: an answer of 45% against 40% is not one name.
function runnersUp(results) {
  const [first, ...rest] = results;
  const seen = new Set([first.item.person_id]);
  const others = [];
  for (const result of rest) {
    const person = result.item.person_id;
    if (person !== null && seen.has(person)) continue;
    seen.add(person);
    others.push(result);
  }
  const [best] = others.sort((a, b) => b.probability - a.probability);
  if (!best || best.probability < 0.05) return [];
  const who = best.item.person_id === null
    ? `the unlabelled person of result ${best.rank}` : `person ${best.item.person_id}`;
  return [`Next: ${who}, ${percent(best.probability)}`];
}

/** One line on what the probability means. prior: as it was assumed. */
export const meaning = (body, prior) =>
  "Each percentage is the probability that the person you look for is the person of that result"
  + `, if it was ${exactPercent(prior)} likely before looking that they are among the `
  + `${plural(body.people, "person", "people")} searched. `
  + "It is an estimate of a model, not proof of identity.";

/** What was searched, in one line. */
export function extent(body) {
  const scored = body.exhaustive ? "all compared in full" : `${body.candidates.toLocaleString("en")} compared in full`;
  return `Searched ${plural(body.searched, "item")} of ${plural(body.people, "person", "people")}, ${scored}`;
}

/** How far a result moved: {from, to, by}, or null where it did not or the ranks do not compare. */
function move(from, to) {
  return from === null || from === undefined || from === to ? null : { from, to, by: from - to };
}

/** What modulation and re-ranking did to a result's rank: [{what, from, to, by}]. */
export function moves(result, body, asked) {
  if (asked.grouped) return []; // ranks before count images, these count people
  const found = [];
  const modulated = asked.modulation && move(result.unmodulated_rank, result.rank);
  const reranked = body.rerank !== "none" && move(result.rank_before_rerank, result.rank);
  if (modulated) found.push({ what: "modulation", against: "the unmodulated order", ...modulated });
  if (reranked) found.push({ what: "re-ranking", against: "the order before re-ranking", ...reranked });
  return found;
}

/** A move for a screen reader. */
export const moveInWords = ({ by, from, to, against }) =>
  `${by > 0 ? "up" : "down"} ${Math.abs(by)} against ${against}, from ${from} to ${to}`;

/** How well each part of each result agrees, from the top, from 0 to 1; null where unknown.
 *
 * Where the checkpoint has no calibrated agreement: exp(−d²/m), m the mean of the answer's squared
 * part distances, as the contact sheet draws it.
 */
export function agreements(results) {
  const all = results.flatMap((result) => result.parts ?? []);
  const mean = all.reduce((sum, one) => sum + one, 0) / all.length || 1;
  return results.map((result) => result.agreement
    ?? (result.parts ? result.parts.map((d) => Math.exp(-d / mean)) : null));
}
