// An error as the service words it, with what to do next: wait and repeat, enter a key, or mend the
// input.
import { keyWanted } from "../api.js";
import { html, useEffect, useState } from "../ui.js";

/** Seconds left until a time, counted down to 0. */
function useCountdown(seconds, error) {
  const [left, setLeft] = useState(seconds);
  useEffect(() => {
    setLeft(seconds);
    const end = Date.now() + seconds * 1000;
    const timer = setInterval(() => {
      const rest = Math.max(0, Math.ceil((end - Date.now()) / 1000));
      setLeft(rest);
      if (rest === 0) clearInterval(timer);
    }, 250);
    return () => clearInterval(timer);
  }, [error]);
  return left;
}

/** error: an ApiError, or any Error (a defect of the page). onRetry: repeats what failed. */
export function Problem({ error, onRetry = null }) {
  const wait = error.overloaded || error.unavailable ? error.retryAfter ?? (error.overloaded ? 1 : 0) : 0;
  const left = useCountdown(wait, error);
  const kind = error.overloaded || error.unavailable || error.refused ? "warning" : "error";
  const repeatable = onRetry && (error.status === undefined || error.overloaded || error.unavailable
    || error.status >= 500 || error.status === 408);
  return html`
    <div class=${`notice ${kind}`} role="alert" data-code=${error.code}>
      <strong>${error.title ?? "The page met a defect"}</strong>
      ${error.fields?.length > 1
        ? html`<ul>${error.fields.map((field) => html`<li>${worded(field)}</li>`)}</ul>`
        : html`<p>${said(error)}</p>`}
      ${hint(error) && html`<p class="soft">${hint(error)}</p>`}
      <div class="row">
        ${error.refused && html`<button type="button" class="button"
          onClick=${() => { keyWanted.value = error; }}>Enter a key</button>`}
        ${repeatable && html`<button type="button" class="button" disabled=${left > 0}
          onClick=${onRetry}>${left > 0 ? `Try again in ${left} s` : "Try again"}</button>`}
      </div>
    </div>`;
}

// What forms call the parameters of the API.
const NAMES = {
  person_id: "Person", camera_id: "Camera", exclude_camera_id: "Without cameras", query_camera_id: "Camera of the query",
  captured_at: "Captured", captured_from: "Captured from", captured_to: "Captured until",
  modality: "Modality", gallery_modality: "Pictures that are", polarity: "Polarity", image: "Picture", box: "Box",
  top_k: "Show at most", prior: "Prior", rerank: "Re-ranking", modulation: "Modulation", metadata: "Metadata",
};
const RAW = /\b[a-z]+(?:_[a-z]+)+\b/g; // other words mean what they say

/** A wrong parameter in words: its name as forms have it, without its place in a list. */
function worded({ name, detail }) {
  const [first] = name.split(".");
  return `${Object.hasOwn(NAMES, first) ? NAMES[first] : name}: ${sentence(renamed(detail), false)}`;
}

const renamed = (text) => text.replace(RAW, (name) => (Object.hasOwn(NAMES, name) ? `“${NAMES[name]}”` : name));

/** What an error says, with wrong parameters as forms call them. */
export function said(error) {
  if (error.fields?.length) return error.fields.map(worded).join(" ");
  return sentence(error.detail ?? error.message);
}

/** The service's sentences begin small and have no full stop, to stand in longer ones. */
function sentence(text, begins = true) {
  const whole = begins ? text.charAt(0).toUpperCase() + text.slice(1) : text;
  return /[.!?]$/.test(whole) ? whole : `${whole}.`;
}

function hint(error) {
  if (error.overloaded) return "The service has more to do than it can take; nothing was lost.";
  if (error.code === "unreachable") return "What you entered is kept.";
  if (error.unavailable) return "The service is not ready; what you entered is kept.";
  return null;
}
