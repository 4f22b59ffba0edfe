// All that views need of the libraries, from one place. `html` makes elements from templates; text
// put into one is always text, never markup.
import { h } from "../vendor/preact.js";
import htm from "../vendor/htm.js";

export { Fragment, createPortal, h, render } from "../vendor/preact.js";
export {
  useCallback, useEffect, useErrorBoundary, useId, useLayoutEffect, useMemo, useRef, useState,
} from "../vendor/hooks.js";
export {
  batch, computed, effect, signal, untracked, useComputed, useSignal, useSignalEffect,
} from "../vendor/signals.js";
export const html = htm.bind(h);
