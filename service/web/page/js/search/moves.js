// Where the first results came from: their place without modulation, before re-ranking, and now.
import { personName } from "../format.js";
import { html } from "../ui.js";
import { moves } from "./words.js";

const SHOWN = 20;
const ROW = 26, TOP = 34, LEFT = 90, STEP = 190;

/** Lines from place to place, for the first results. */
export function MovesChart({ answer }) {
  const { body, asked } = answer;
  if (asked.grouped) {
    return html`<p class="card padded soft">Rank moves are about single pictures: switch “Group by person” off to see them.</p>`;
  }
  const stages = [
    asked.modulation && ["without modulation", (one) => one.unmodulated_rank],
    body.rerank !== "none" && ["before re-ranking", (one) => one.rank_before_rerank],
    ["as shown", (one) => one.rank],
  ].filter(Boolean);
  if (stages.length === 1) {
    return html`<p class="card padded soft">Neither modulation nor re-ranking is on, so nothing has moved.</p>`;
  }
  const shown = body.results.slice(0, SHOWN);
  const rows = stages.map(([, rank]) => rowsOf(shown.map(rank), shown.length));
  const most = Math.max(...rows.flatMap((one) => [...one.values()]));
  const y = (stage, rank) => TOP + ROW * (rows[stage].get(rank) - 0.5);
  const x = (stage) => LEFT + STEP * stage;
  const moved = shown.filter((one) => moves(one, body, asked).length).length;
  const width = x(stages.length - 1) + 210, height = TOP + ROW * (most + 0.5);
  return html`
    <figure class="card padded moves-chart">
      <figcaption><h3>Rank moves</h3>
        <p class="soft">${moved} of the first ${shown.length} results stand elsewhere than they would
          without modulation or re-ranking. Each card says by how much.</p></figcaption>
      <div class="scroll" tabindex="0" role="group" aria-label="Chart of rank moves">
      <svg width=${width} height=${height} viewBox=${`0 0 ${width} ${height}`} role="img"
        aria-label=${shown.map((one) => `${personName(one.item)}: ${stages.map(([, rank]) => rank(one)).join(" to ")}`).join("; ")}>
        ${stages.map(([name], stage) => html`<text key=${name} x=${x(stage)} y="16" text-anchor="middle" class="moves-head">${name}</text>`)}
        ${shown.map((one) => html`
          <g key=${one.item.id} class=${`moves-line ${direction(stages[0][1](one), one.rank)}`}>
            <polyline points=${stages.map(([, rank], stage) => `${x(stage)},${y(stage, rank(one))}`).join(" ")} />
            ${stages.map(([name, rank], stage) => html`<${Place} key=${name} x=${x(stage)} y=${y(stage, rank(one))} rank=${rank(one)} />`)}
            <text x=${x(stages.length - 1) + 20} y=${y(stages.length - 1, one.rank) + 4} class="moves-name">${short(personName(one.item))}</text>
          </g>`)}
      </svg></div>
    </figure>`;
}

/** The row of each rank: its own, and below the last one shown those that were further down. */
function rowsOf(ranks, shown) {
  const further = [...new Set(ranks.filter((rank) => rank > shown))].sort((a, b) => a - b);
  return new Map(ranks.map((rank) => [rank, rank > shown ? shown + 1 + further.indexOf(rank) : rank]));
}

function Place({ x, y, rank }) {
  return html`<circle cx=${x} cy=${y} r="11" /><text x=${x} y=${y + 4} text-anchor="middle" class="moves-rank">${rank}</text>`;
}

const direction = (from, to) => (from === to ? "still" : from > to ? "up" : "down");
const short = (text) => ([...text].length > 24 ? `${[...text].slice(0, 23).join("")}…` : text);
