// What several views share: the model card, the names to suggest, the theme, announcements.
import { getCameras, getModel, isAborted, whenKeyChanges } from "./api.js";
import { effect, signal } from "./ui.js";

/** GET /model, or null before it is known. `modelProblem`: why it is not. */
export const model = signal(null);
export const modelProblem = signal(null);

/** Cameras that the gallery has defaults for, and those seen in answers and lists: to suggest. */
export const cameras = signal(new Set());

/** Read the model card and cameras: at the start, and again with a new key. */
export async function refreshModel() {
  try {
    model.value = await getModel({ quiet: true });
    modelProblem.value = null;
    noteCameras((await getCameras({ quiet: true })).map((camera) => camera.camera_id));
  } catch (error) {
    if (!isAborted(error)) modelProblem.value = error;
  }
}

// What a key was told goes with it.
whenKeyChanges((key) => {
  if (!key) {
    cameras.value = new Set();
    persons.value = new Set();
    model.value = null;
  }
  refreshModel();
});

/** Remember cameras that an answer or a list named. */
export function noteCameras(ids) {
  const fresh = ids.filter((id) => id && !cameras.value.has(id));
  if (fresh.length) cameras.value = new Set([...cameras.value, ...fresh]);
}

/** People that answers and lists named: to suggest. */
export const persons = signal(new Set());

/** Remember people that an answer or a list named. */
export function notePersons(ids) {
  const fresh = ids.filter((id) => id && !persons.value.has(id));
  if (fresh.length) persons.value = new Set([...persons.value, ...fresh]);
}

/** Suggest a person no longer: they were erased. */
export function forgetPerson(id) {
  persons.value = new Set([...persons.value].filter((one) => one !== id));
}

/** The latest thing that a screen reader is to say. */
export const announcement = signal("");
export function announce(text) {
  announcement.value = ""; // the same words again are said again
  setTimeout(() => { announcement.value = text; });
}

/** "light", "dark", or "auto": as the system has it. */
export const theme = signal(document.documentElement.dataset.theme ?? "auto");
effect(() => {
  if (theme.value === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme.value;
  try {
    if (theme.value === "auto") localStorage.removeItem("cmt-theme");
    else localStorage.setItem("cmt-theme", theme.value);
  } catch { /* storage is off */ }
});
