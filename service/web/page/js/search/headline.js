// The answer in words: who it probably is, how probable that is, and what was assumed.
import { decimal, percent } from "../format.js";
import { model } from "../state.js";
import { html, useEffect, useRef } from "../ui.js";
import { extent, headline, meaning } from "./words.js";

const MARKS = { likely: "✓", possible: "?", none: "–", unknown: "≈" };

export function Headline({ answer }) {
  const { body, asked, pictures } = answer;
  const words = headline(body);
  const element = useRef(null);
  // On a phone the answer to a new query stands below the query: show it.
  useEffect(() => {
    if (matchMedia("(max-width: 859px)").matches) element.current.scrollIntoView({ block: "start" });
  }, [pictures]);
  const cutoffs = model.value?.match;
  const prior = asked.prior ?? model.value?.prior ?? 0.5;
  const own = body.results.find((result) => pictures.some((one) => one.item?.id === result.item.id));
  return html`
    <section ref=${element} class=${`card headline ${words.kind}`} aria-labelledby="headline" data-match=${body.match ?? "unknown"}>
      <span class="headline-mark" aria-hidden="true">${MARKS[words.kind]}</span>
      <div class="headline-words">
        <h2 id="headline" class="text">${words.title}</h2>
        <p class="headline-facts">
          ${words.figure && html`<strong>${words.figure}</strong>`}
          ${words.whole && html`<span>${words.whole}</span>`}
        </p>
        ${words.notes.map((note) => html`<p key=${note} class="text">${note}</p>`)}
        ${own && html`<p class="own">The query is itself enrolled, as result ${own.rank}: a picture always finds itself,
          so look at the results after it.</p>`}
        ${!asked.modulation && html`<p>Ranked without modulation, to compare.</p>`}
        <p class="soft" aria-live="off">${extent(body)}; re-ranking ${body.rerank === "none" ? "off" : "on"}.
          ${words.kind !== "unknown" && body.searched > 0 && ` ${meaning(body, prior)}`}</p>
        ${words.kind !== "unknown" && html`
          <details class="soft" aria-live="off"><summary>How to read this</summary>
            <ul>
              ${cutoffs && html`<li>“Likely” from a probability of ${percent(cutoffs.likely)} for the first result;
                “Probably not enrolled” where it is under ${percent(cutoffs.none)} likely that the person is among
                those searched; “Possibly” between.</li>`}
              <li>All pictures of one person carry the same probability: that of the person, by the best picture.</li>
              <li>Similarity is about one pair of pictures at even odds. The best of many pairs looks good by chance, too.</li>
              <li>The model was fitted on its own people and cameras; on others its probabilities may be too sure.
                Compare the pictures yourself before you act on a name.</li>
            </ul></details>`}
      </div>
      ${words.kind !== "unknown" && html`<${Scale} body=${body} cutoffs=${cutoffs} />`}
    </section>`;
}

/** Both probabilities as bars, with the cut-offs of the words. */
function Scale({ body, cutoffs }) {
  const first = body.results[0]?.probability ?? 0;
  const bar = (label, value, cut, meaning) => html`
    <div class="scale-row">
      <span>${label}</span><b>${percent(value)}</b>
      <span class="scale-track" aria-hidden="true">
        <span class="scale-fill" style=${{ width: `${100 * value}%` }}></span>
        ${cut !== undefined && html`<span class="scale-cut" style=${{ left: `${100 * cut}%` }} title=${meaning}></span>`}
      </span>
    </div>`;
  return html`
    <div class="scale" aria-live="off">
      ${bar("First result is the person", first, cutoffs?.likely, `likely from ${decimal(cutoffs?.likely, 2)}`)}
      ${bar("Enrolled at all", body.probability_enrolled ?? 0, cutoffs?.none, `not enrolled under ${decimal(cutoffs?.none, 2)}`)}
    </div>`;
}
