// The crop of a gallery item: fetched when it comes near the screen, with a place of its own before.
import { attempt, borrow } from "../pictures.js";
import { apiKey, isAborted } from "../api.js";
import { html, useEffect, useRef, useState } from "../ui.js";

const watchers = new Map(); // element → what to call once it is near
const near = new IntersectionObserver((seen) => {
  for (const { isIntersecting, target } of seen) {
    if (isIntersecting) watchers.get(target)?.();
  }
}, { rootMargin: "600px" });

// Paper has no near and far: all is drawn and fetched.
let printing = false;
addEventListener("beforeprint", () => {
  printing = true;
  for (const then of [...watchers.values()]) then();
});
addEventListener("afterprint", () => { printing = false; });

/** Call `then` each time an element comes near the screen → what to call to stop that. */
export function whenNear(element, then) {
  if (printing) queueMicrotask(then);
  watchers.set(element, then);
  near.observe(element);
  return () => { watchers.delete(element); near.unobserve(element); };
}

/** id: of the item. height: of the thumbnail, null for the whole crop. eager: fetch it at once. */
export function Picture({ id, height = null, alt, eager = false }) {
  const frame = useRef(null);
  const [url, setUrl] = useState(null);
  const [failed, setFailed] = useState(false);
  const [tries, setTries] = useState(0);
  const key = apiKey.value;
  useEffect(() => {
    let loan = null, gone = false, stop = () => {};
    setUrl(null);
    setFailed(false);
    const load = () => {
      if (loan) return;
      stop();
      loan = borrow(id, height);
      loan.url.then(
        (found) => { if (!gone) setUrl(found); },
        (error) => { if (!gone && !isAborted(error)) setFailed(true); },
      );
    };
    if (eager) load();
    else stop = whenNear(frame.current, load);
    return () => { gone = true; stop(); loan?.release(); };
  }, [id, height, eager, key, tries]);
  useEffect(() => {
    if (!failed) return undefined;
    const seen = attempt.peek();
    return attempt.subscribe((now) => { if (now !== seen) setTries(now); });
  }, [failed]);
  return html`
    <span class=${`picture ${url ? "" : "picture-empty"}`} ref=${frame}>
      <img alt=${alt} src=${url ?? "data:,"} hidden=${failed} />
      ${failed && html`<span class="picture-failed">picture not available</span>`}
    </span>`;
}
