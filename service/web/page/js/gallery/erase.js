// Erasing: one item, or all of a person. Asked first, since nothing brings it back.
import { deleteItem, erasePerson, isAborted, listItems } from "../api.js";
import { Dialog } from "../components/dialog.js";
import { Loaded, useLoaded, useNewKey } from "../components/loaded.js";
import { Problem } from "../components/problem.js";
import { plural } from "../format.js";
import { forget } from "../pictures.js";
import { itemChanged, personErased } from "../search/state.js";
import { announce } from "../state.js";
import { html, useState } from "../ui.js";

/** title, action: the verb on the button. perform: what is asked about; its errors are shown here. */
function Ask({ title, action, perform, onClose, ready = true, children }) {
  const [busy, setBusy] = useState(false);
  const [error, setError] = useState(null);
  const confirm = async () => {
    setBusy(true);
    setError(null);
    try {
      await perform();
    } catch (failure) {
      if (!isAborted(failure)) setError(failure);
      setBusy(false);
    }
  };
  useNewKey(error, confirm);
  return html`
    <${Dialog} title=${title} onClose=${onClose} footer=${html`
      <button type="button" class="button" onClick=${onClose} autofocus>Cancel</button>
      <button type="button" class="button danger" disabled=${busy || !ready} onClick=${confirm}>
        ${busy ? "Erasing …" : action}</button>`}>
      <div class="stack">${children}${error && html`<${Problem} error=${error} onRetry=${confirm} />`}</div>
    <//>`;
}

/** Ask, then delete an item. */
export function Delete({ item, onClose, onDeleted }) {
  const perform = async () => {
    try {
      await deleteItem(item.id);
    } catch (error) {
      if (error.code !== "item_not_found") throw error; // gone already is what was wanted
    }
    forget(item.id);
    itemChanged(item.id, null);
    announce("The item is deleted");
    onDeleted();
  };
  return html`<${Ask} title="Delete this item?" action="Delete" perform=${perform} onClose=${onClose}>
    <p class="text">Its picture, its labels and what it is found by go
      ${item.person_id === null ? "" : html`; other items of <b>${item.person_id}</b> stay`}. This cannot be taken back.</p>
  <//>`;
}

/** Ask, then erase all items of a person. */
export function Erase({ person, onClose, onErased }) {
  const counted = useLoaded(async (options) =>
    (await listItems({ person_id: person, limit: 1 }, options)).total, [person]);
  const perform = async () => {
    // Their pictures must not stay here either.
    const items = [];
    let cursor = null;
    do {
      const found = await listItems({ person_id: person, limit: 1000, cursor });
      items.push(...found.items);
      cursor = found.next_cursor;
    } while (cursor);
    const { deleted } = await erasePerson(person);
    items.forEach((item) => { forget(item.id); itemChanged(item.id, null); });
    personErased(person);
    announce(`${plural(deleted, "item")} erased`);
    onErased(deleted);
  };
  return html`<${Ask} title="Erase this person?" action="Erase" perform=${perform} onClose=${onClose}
    ready=${counted.value > 0}>
    <${Loaded} loaded=${counted} what="how many items there are">
      <p class="text"><b>${plural(counted.value ?? 0, "item")}</b> of person <b>${person}</b>: pictures, labels and what
        they are found by. No query returns them afterwards. This cannot be taken back.</p>
    <//>
  <//>`;
}
