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
      <p>${sentence(error.detail ?? error.message)}</p>
      ${error.fields?.length > 1 && html`<ul>${error.fields.map((field) =>
        html`<li><code>${field.name}</code> ${field.detail}</li>`)}</ul>`}
      ${hint(error) && html`<p class="soft">${hint(error)}</p>`}
      <div class="row">
        ${error.refused && html`<button type="button" class="button"
          onClick=${() => { keyWanted.value = error; }}>Enter a key</button>`}
        ${repeatable && html`<button type="button" class="button" disabled=${left > 0}
          onClick=${onRetry}>${left > 0 ? `Try again in ${left} s` : "Try again"}</button>`}
      </div>
    </div>`;
}

/** The service's sentences begin small and have no full stop, to stand in longer ones. */
function sentence(text) {
  const whole = text.charAt(0).toUpperCase() + text.slice(1);
  return /[.!?]$/.test(whole) ? whole : `${whole}.`;
}

function hint(error) {
  if (error.overloaded) return "The service has more to do than it can take; nothing was lost.";
  if (error.code === "unreachable") return "What you entered is kept.";
  if (error.unavailable) return "The service is not ready; what you entered is kept.";
  return null;
}
