// The chosen theme, set before anything is drawn so that the page never flashes in the other one.
// A classic script: modules run only after the first paint.
{
  let chosen = null;
  try { chosen = localStorage.getItem("cmt-theme"); } catch { /* storage is off */ }
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
}
