// How well each part of a crop agrees with the query: bands over the picture, from head to feet.
import { percent } from "../format.js";
import { html } from "../ui.js";

const shade = (value) => (value < 1 / 3 ? "low" : value < 2 / 3 ? "mid" : "high");

/** values: from 0 to 1, from the top. calibrated: whether they are probabilities. */
export function Bands({ values, calibrated }) {
  const words = values.map(percent).join(", ");
  return html`
    <span class="bands" role="img" aria-label=${`Agreement from head to feet${calibrated ? "" : ", relative"}: ${words}`}>
      ${values.map((value, place) => html`
        <span key=${place} class=${`band ${shade(value)}`}><span>${Math.round(100 * value)}</span></span>`)}
    </span>`;
}
