// How it is searched: what the query is, the prior, modulation, re-ranking, length.
import { MODALITIES, exactPercent } from "../format.js";
import { model } from "../state.js";
import { html, useEffect, useId, useState } from "../ui.js";
import { answer, change, noteFault, options } from "./state.js";

/** What the pictures are: detected, and changeable. */
export function QueryKind() {
  const chosen = options.value;
  const found = answer.value?.body.query;
  const detected = !chosen.modality && found
    ? `Detect (${MODALITIES[found.modality]})` : "Detect";
  const infrared = chosen.modality === "ir" || (chosen.modality === "" && found && found.modality !== "rgb");
  return html`
    <div class="two">
      <label class="field"><span>The query is</span>
        <select name="modality" value=${chosen.modality} onChange=${(event) => change({ modality: event.target.value })}>
          <option value="">${detected}</option>
          <option value="rgb">Visible</option>
          <option value="ir">Infrared</option>
        </select></label>
      ${infrared && html`
        <label class="field"><span>Polarity</span>
          <select name="polarity" value=${chosen.polarity} onChange=${(event) => change({ polarity: event.target.value })}>
            <option value="">${found?.polarity && !chosen.polarity ? `Default (${POLARITIES[found.polarity]})` : "Default"}</option>
            <option value="white_hot">${POLARITIES.white_hot}</option>
            <option value="black_hot">${POLARITIES.black_hot}</option>
          </select></label>`}
    </div>`;
}
const POLARITIES = { white_hot: "warm is bright", black_hot: "warm is dark" };

/** The prior, in the words of the question that it answers. */
export function Prior() {
  const standard = model.value?.prior ?? 0.5;
  const prior = options.value.prior ?? standard;
  const id = useId();
  const [text, setText] = useState(inPercent(prior));
  const [fault, setFault] = useState(null);
  const tell = (sentence) => { setFault(sentence); noteFault("Prior", sentence); };
  useEffect(() => { setText(inPercent(prior)); tell(null); }, [prior]);
  useEffect(() => () => noteFault("Prior", null), []);
  const set = (value) => {
    const share = Number(value) / 100;
    const right = value !== "" && share > 0 && share < 1;
    setText(value);
    tell(right ? null : "Give more than 0 and less than 100 percent; certainty is no prior.");
    if (right && share !== prior) change({ prior: share });
  };
  const standardAgain = () => { setText(inPercent(standard)); tell(null); change({ prior: null }); };
  return html`
    <fieldset class="field prior">
      <legend>Before looking, how likely is it that this person is enrolled?</legend>
      <div class="row nowrap">
        <input type="range" min="1" max="99" step="1" aria-label="Prior, in percent" value=${Math.round(100 * prior)}
          onInput=${(event) => setText(event.target.value)} onChange=${(event) => set(event.target.value)} />
        <input type="number" name="prior" class="percent" step="any" aria-label="Prior in percent, exactly" value=${text}
          aria-invalid=${fault ? "true" : null} aria-describedby=${fault ? id : null}
          onInput=${(event) => setText(event.target.value)} onChange=${(event) => set(event.target.value)} /><span>%</span>
      </div>
      ${fault && html`<p class="fault" id=${id} role="alert">${fault}</p>`}
      <p class="soft">${options.value.prior === null && !fault ? "The service's standard." : html`
        <button type="button" class="link" onClick=${standardAgain}>Back to the standard, ${exactPercent(standard)}</button>`}</p>
    </fieldset>`;
}
const inPercent = (share) => exactPercent(share).slice(0, -1);

/** Ways to rank, to compare them. */
export function Ranking() {
  const chosen = options.value;
  const used = answer.value?.body.rerank;
  const reranked = chosen.rerank === "" ? used !== "none" : chosen.rerank === "k_reciprocal";
  return html`
    <fieldset class="field">
      <legend>Ranking</legend>
      <div class="checks">
        <${Switch} name="modulation" label="Modulation" on=${chosen.modulation} set=${(on) => change({ modulation: on })}
          title="Compare as this query's γ and β say; off ranks by plain distance" />
        <${Switch} name="rerank" label="Re-ranking" on=${Boolean(used || chosen.rerank) && reranked}
          disabled=${!used && !chosen.rerank}
          set=${(on) => change({ rerank: on ? "k_reciprocal" : "none" })}
          title=${used ? "Let the neighbours of the best results count too" : "As the checkpoint says; the first answer shows it"} />
        <${Switch} name="grouped" label="Group by person" on=${chosen.grouped} set=${(on) => change({ grouped: on })}
          title="Only the best picture of each person" />
        <${Switch} name="exhaustive" label="Compare all in full" on=${chosen.exhaustive} set=${(on) => change({ exhaustive: on })}
          title="Score the whole gallery instead of a shortlist; slower" />
      </div>
    </fieldset>
    <label class="field"><span>Show at most</span>
      <select name="top_k" value=${chosen.topK} onChange=${(event) => change({ topK: Number(event.target.value) })}>
        ${[10, 20, 50, 100, 300, 1000].map((count) => html`<option key=${count} value=${count}>
          ${count} ${chosen.grouped ? "people" : "results"}</option>`)}
      </select></label>`;
}

export function Switch({ name, label, on, set, title, disabled = false }) {
  return html`
    <label class="check" title=${title}>
      <input type="checkbox" role="switch" name=${name} checked=${on} disabled=${disabled}
        onChange=${(event) => set(event.target.checked)} />${label}</label>`;
}
