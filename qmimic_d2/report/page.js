"use strict";

// Tables: a heading sorts by its column, numbers from the largest on, words from A on; once more, the other way.
for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  const keyOf = (row, column) => {
    const cell = row.cells[column];
    if (!("value" in cell.dataset)) return cell.textContent.trim();
    return cell.dataset.value === "" ? null : Number(cell.dataset.value);
  };
  headings.forEach((heading, column) => {
    heading.querySelector("button").addEventListener("click", () => {
      const rows = [...body.rows];
      const isWords = rows.some((row) => typeof keyOf(row, column) === "string");
      const before = heading.getAttribute("aria-sort");
      const first = isWords ? "ascending" : "descending";
      const other = isWords ? "descending" : "ascending";
      const order = before === first ? other : first;
      const sign = order === "ascending" ? 1 : -1;
      rows.sort((rowA, rowB) => {
        const a = keyOf(rowA, column);
        const b = keyOf(rowB, column);
        if (a === null || b === null) return (a === null) - (b === null); // what is not known stands last
        return sign * (isWords ? a.localeCompare(b, "en", { numeric: true }) : a - b);
      });
      body.append(...rows);
      for (const each of headings) each.setAttribute("aria-sort", each === heading ? order : "none");
    });
  });
}

// Pictures: a dialog shows one large; the browser closes it on Escape and gives the focus back.
const viewer = document.getElementById("viewer");
const place = document.getElementById("viewer-picture");
const caption = document.getElementById("viewer-caption");
let row = [];
let shown = 0;

function show(index) {
  shown = (index + row.length) % row.length;
  caption.textContent = row[shown].dataset.caption;
  place.replaceChildren(row[shown].querySelector("svg").cloneNode(true));
}

for (const button of document.querySelectorAll(".enlarge")) {
  button.addEventListener("click", () => {
    row = [...document.querySelectorAll(".enlarge")].filter((each) => each.dataset.row === button.dataset.row);
    show(row.indexOf(button));
    viewer.showModal();
  });
}
document.getElementById("viewer-previous").addEventListener("click", () => show(shown - 1));
document.getElementById("viewer-next").addEventListener("click", () => show(shown + 1));
document.getElementById("viewer-close").addEventListener("click", () => viewer.close());
viewer.addEventListener("click", (event) => {
  if (event.target === viewer) viewer.close(); // beside the picture
});
viewer.addEventListener("keydown", (event) => {
  if (event.key === "ArrowLeft") show(shown - 1);
  if (event.key === "ArrowRight") show(shown + 1);
});
