"use strict";
// Sorting: a heading's button sorts its table by `data-v`, or else by text; unknown goes last.
const value = (row, column) => {
  const cell = row.cells[column];
  return cell.dataset.v !== undefined ? cell.dataset.v : cell.textContent.trim();
};
const compare = (a, b) => {
  const x = parseFloat(a), y = parseFloat(b);
  return isNaN(x) || isNaN(y) ? a.localeCompare(b, "en", { numeric: true }) : x - y;
};
const unknown = (text) => text === "" || text === "—";
for (const button of document.querySelectorAll("table.sortable th button")) {
  button.addEventListener("click", () => {
    const head = button.closest("th"), table = head.closest("table");
    const column = head.cellIndex, body = table.tBodies[0];
    const down = head.getAttribute("aria-sort") === null
      ? head.dataset.first === "descending"
      : head.getAttribute("aria-sort") === "ascending";
    for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const rows = Array.from(body.rows);
    rows.sort((r, s) => {
      const a = value(r, column), b = value(s, column);
      if (unknown(a) || unknown(b)) return unknown(a) - unknown(b);
      return down ? compare(b, a) : compare(a, b);
    });
    body.append(...rows);
  });
}
// The image browser shows one run at a time.
const choice = document.getElementById("run-choice");
if (choice) {
  const show = () => {
    for (const part of document.querySelectorAll("[data-images-of]"))
      part.hidden = part.dataset.imagesOf !== choice.value;
  };
  choice.addEventListener("change", show);
  show();
}
// A small picture opens large.
const dialog = document.getElementById("large");
for (const button of document.querySelectorAll("button.open")) {
  button.addEventListener("click", () => {
    const from = button.querySelector("img"), to = dialog.querySelector("img");
    to.src = from.src;
    to.alt = from.alt;
    dialog.querySelector("p").textContent = from.alt;
    dialog.showModal();
  });
}
if (dialog) dialog.querySelector("button").addEventListener("click", () => dialog.close());
// A link to a run opens its details.
const reveal = () => {
  const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  const details = target && target.closest("details");
  if (details) { details.open = true; target.scrollIntoView(); }
};
addEventListener("hashchange", reveal);
reveal();
