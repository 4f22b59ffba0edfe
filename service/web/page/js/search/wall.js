// The results as a wall of pictures, with what can be drawn over it and taken out of it.
import { html, signal, useLayoutEffect, useMemo, useRef, useState } from "../ui.js";
import { Card } from "./card.js";
import { Compare } from "./compare.js";
import { Export } from "./export.js";
import { MovesChart } from "./moves.js";
import { Switch } from "./options.js";
import { searchLike } from "./state.js";
import { agreements } from "./words.js";

// Kept while other answers come: who looks at bands looks at them in each answer.
const bands = signal(false);
const chart = signal(false);
let opened = null; // the id of the item that was opened last

export function Wall({ answer, busy }) {
  const { results } = answer.body;
  const [compared, setCompared] = useState(null);
  const shares = useMemo(() => agreements(results), [results]);
  const explained = shares.some(Boolean);
  const calibrated = results.some((result) => result.agreement);
  // Drawn again only where it would look different: a wall may hold a thousand cards.
  const many = results.length > 60;
  const cards = useMemo(() => results.map((result, place) => html`
    <${Card} key=${result.item.id} lazy=${many && result.item.id !== opened} result=${result} answer=${answer} agreement=${shares[place]}
      bands=${bands.value} onCompare=${setCompared} onLike=${searchLike} />`), [answer, bands.value]);
  const wall = useRef(null);
  useLayoutEffect(() => { // back from an item: where it was opened
    const card = opened && wall.current?.querySelector(`[data-item="${CSS.escape(opened)}"]`);
    opened = null;
    card?.scrollIntoView({ block: "center" });
    card?.querySelector("a")?.focus({ preventScroll: true });
  }, []);
  const noteOpened = (event) => {
    opened = event.target.closest("a") && event.target.closest("[data-item]")?.dataset.item;
  };
  if (!results.length) return null;
  return html`
    <section class="wall" aria-label="Results" aria-busy=${busy}>
      <div class="row wall-tools">
        <${Switch} name="bands" label="Agreement of parts" on=${bands.value && explained} disabled=${!explained}
          set=${(on) => { bands.value = on; }} title="How well each part agrees with the query, in six bands from head to feet" />
        <${Switch} name="moves" label="Rank moves" on=${chart.value} set=${(on) => { chart.value = on; }}
          title="What modulation and re-ranking changed" />
        <span class="grow"></span>
        <${Export} answer=${answer} />
      </div>
      ${bands.value && html`<p class="soft">${!explained ? "This checkpoint compares crops as a whole; it knows no parts."
        : calibrated ? "Bands: the probability, at even odds, that this part shows the same person, in percent."
          : "Bands: agreement relative to this answer; the checkpoint has no calibrated one."}</p>`}
      ${chart.value && html`<${MovesChart} answer=${answer} />`}
      <ol ref=${wall} onClick=${noteOpened} class=${`results ${many ? "results-many" : ""}`}>${cards}</ol>
      ${compared !== null && html`<${Compare} answer=${answer} agreements=${shares} first=${compared}
        onClose=${() => setCompared(null)} onLike=${searchLike} />`}
    </section>`;
}
