// The search view: what is searched for and how on one side, the answer on the other.
import { Problem } from "../components/problem.js";
import { go, replace } from "../router.js";
import { model, modelProblem, refreshModel } from "../state.js";
import { html, useEffect } from "../ui.js";
import { Filters } from "./filters.js";
import { Headline } from "./headline.js";
import { Prior, QueryKind, Ranking } from "./options.js";
import { Pick } from "./pick.js";
import {
  answer, clearFilters, filterCount, problem, search, searchLike, searching,
} from "./state.js";
import { Wall } from "./wall.js";

// On a phone the answer comes first, and what shapes it is folded away.
const WIDE = matchMedia("(min-width: 860px)");

export function SearchView({ parameters }) {
  const like = parameters.get("like");
  useEffect(() => {
    if (!like) return;
    searchLike(like);
    replace("search"); // so that "back" does not search again, and the same address does
  }, [like]);
  return html`
    <div class="view search">
      <h1 class="visually-hidden">Find a person</h1>
      <div class="search-side">
        <${Pick} />
        <details class="card fold" open=${WIDE.matches}>
          <summary>Options</summary>
          <div class="stack fold-body"><${QueryKind} /><${Prior} /><${Ranking} /></div>
        </details>
        <${Filters} />
      </div>
      <div class="search-main">
        <div class=${searching.value ? "dimmed" : ""} aria-live="polite"><${Verdict} /></div>
        <${Answer} />
      </div>
    </div>`;
}

// Apart from the rest, in an element that stays: a screen reader reads what appears in it.
function Verdict() {
  return answer.value && !problem.value ? html`<${Headline} answer=${answer.value} />` : null;
}

function Answer() {
  const found = answer.value;
  if (problem.value) return html`<${Problem} error=${problem.value} onRetry=${search} />`;
  if (!found && searching.value) return html`<${Waiting} />`;
  if (!found && modelProblem.value) return html`<${Problem} error=${modelProblem.value} onRetry=${refreshModel} />`;
  if (!found) return html`<${Nothing} />`;
  return html`
    <div class=${searching.value ? "dimmed" : ""}>
      ${searching.value && html`<p class="progress" role="status"><span class="spinner" aria-hidden="true"></span> Searching…</p>`}
      ${!found.body.results.length && html`<${Empty} body=${found.body} />`}
      <${Wall} answer=${found} busy=${searching.value} />
    </div>`;
}

function Waiting() {
  return html`
    <div role="status"><p class="progress"><span class="spinner" aria-hidden="true"></span> Searching…</p>
      <ol class="results" aria-hidden="true">${Array.from({ length: 12 }, (_, place) => html`
        <li key=${place} class="result skeleton"><span class="result-picture"></span></li>`)}</ol></div>`;
}

function Nothing() {
  return html`
    <div class="card empty">
      <strong>Who are you looking for?</strong>
      <p>Choose, drop or paste a picture of one person. The gallery is searched at once, across visible and infrared cameras.</p>
      <p class="soft">${model.value
        ? `The answer says how probable each person is, and whether the person is enrolled at all.`
        : "Asking the service what it can do …"}</p>
    </div>`;
}

function Empty({ body }) {
  const filtered = filterCount() > 0;
  return html`
    <div class="card empty">
      <strong>${body.searched ? "No result to show" : filtered ? "No item passes the filters" : "The gallery is empty"}</strong>
      <p>${filtered ? "Loosen the filters, then search again." : "Enroll pictures of people first; then search again."}</p>
      ${filtered
        ? html`<button type="button" class="button" onClick=${clearFilters}>Clear the filters</button>`
        : html`<button type="button" class="button" onClick=${() => go("enroll")}>Enroll pictures</button>`}
    </div>`;
}
