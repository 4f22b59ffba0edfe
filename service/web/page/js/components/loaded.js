// What a view fetches: shown once it is there, with a word while it is not and what to do where it
// fails.
import { apiKey, isAborted } from "../api.js";
import { retryFailed } from "../pictures.js";
import { html, useCallback, useEffect, useRef, useState } from "../ui.js";
import { Problem } from "./problem.js";

/** Fetch something whenever `wanted` changes, or the key does → {value, error, loading, reload}.
 *
 * load: given {signal}; its answer is dropped where another one is wanted meanwhile. The last value
 * stays while the next one is on its way, but not what another key had fetched. acting: that stays
 * too, until this key's is there or is refused: what is being done with it goes on by the new key.
 */
export function useLoaded(load, wanted, { acting = false } = {}) {
  const [state, setState] = useState({ value: null, error: null, loading: true, key: null });
  const [turn, setTurn] = useState(0);
  const key = apiKey.value;
  useEffect(() => {
    const abort = new AbortController();
    setState((before) => ({ value: acting || before.key === key ? before.value : null, error: null, loading: true, key }));
    retryFailed();
    load({ signal: abort.signal }).then(
      (value) => { if (!abort.signal.aborted) setState({ value, error: null, loading: false, key }); },
      (error) => {
        if (!abort.signal.aborted && !isAborted(error)) setState({ value: null, error, loading: false, key });
      },
    );
    return () => abort.abort();
  }, [...wanted, key, turn]);
  const reload = useCallback(() => setTurn((before) => before + 1), []);
  return { ...state, reload };
}

/** Do again what was refused, once another key is entered. error: of the latest attempt, or null. */
export function useNewKey(error, again) {
  const key = apiKey.value;
  const used = useRef(key);
  useEffect(() => {
    const other = key !== used.current;
    used.current = key;
    if (other && key && error?.refused) again();
  }, [key]);
}

/** Shows its children once something is there. loaded: of useLoaded. what: the words for it. */
export function Loaded({ loaded, what, children }) {
  if (loaded.error) return html`<${Problem} error=${loaded.error} onRetry=${loaded.reload} />`;
  if (loaded.value === null) {
    return html`<p class="loading" role="status"><span class="spinner" aria-hidden="true"></span>
      Loading ${what} …</p>`;
  }
  return html`<div aria-busy=${loaded.loading}>${children}</div>`;
}
