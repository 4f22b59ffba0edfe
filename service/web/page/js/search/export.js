// Take an answer out of the page: a report with pictures, or a table.
import { isAborted } from "../api.js";
import { instant, zonedTime } from "../format.js";
import { model } from "../state.js";
import { html, useEffect, useRef, useState } from "../ui.js";
import { csvOf } from "./csv.js";
import { reportOf } from "./report.js";

/** The filters that an answer was asked with, in words. */
export function filtersInWords(asked) {
  const named = [
    ["cameras", asked.cameraIds.join(", ")],
    ["without cameras", asked.excludeCameraIds.join(", ")],
    ["people", asked.personIds.join(", ")],
    ["only", { rgb: "visible", ir: "infrared" }[asked.galleryModality]],
    ["captured from", asked.capturedFrom && zonedTime(instant(asked.capturedFrom))],
    ["until", asked.capturedTo && zonedTime(instant(asked.capturedTo))],
  ].filter(([, value]) => value);
  return named.length ? `Filters: ${named.map(([name, value]) => `${name} ${value}`).join("; ")}.` : "No filters.";
}

function download(text, type, name) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  const link = document.createElement("a");
  link.href = url;
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}

export function Export({ answer }) {
  const [progress, setProgress] = useState(null);
  const [failure, setFailure] = useState(null);
  const running = useRef(null);
  useEffect(() => () => running.current?.abort(), [answer]);
  const prior = answer.asked.prior ?? model.value?.prior ?? null;
  const stamp = new Date().toISOString().slice(0, 19).replaceAll(":", "-");
  const report = async () => {
    running.current = new AbortController();
    setFailure(null);
    setProgress(0);
    try {
      const text = await reportOf(answer, {
        prior, filters: filtersInWords(answer.asked), signal: running.current.signal, onProgress: setProgress,
      });
      download(text, "text/html;charset=utf-8", `answer-${stamp}.html`);
    } catch (error) {
      if (!isAborted(error)) setFailure(error);
    } finally {
      setProgress(null);
    }
  };
  return html`
    <span role="status" class="soft">${progress !== null && `Collecting pictures: ${progress} of ${answer.body.results.length}`}
      ${failure && html`<span class="wrong">The report could not be made: ${failure.message}</span>`}</span>
    <button type="button" class="button small" disabled=${progress !== null} onClick=${report}>Export HTML</button>
    <button type="button" class="button small" onClick=${() =>
      download(csvOf(answer.body, prior), "text/csv;charset=utf-8", `answer-${stamp}.csv`)}>Export CSV</button>`;
}
