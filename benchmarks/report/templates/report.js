// A click on a heading sorts its table, descending first, then ascending. The address keeps the order
// (#sort=models.4.down), so that a link can share it. Rows without a value stay at the end.
"use strict";
function value(row, column) {
  const text = row.cells[column].dataset.sort;
  return text === "" || Number.isNaN(Number(text)) ? text : Number(text);
}
function compare(a, b) {
  return typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
}
function sort(table, column, down) {
  const body = table.tBodies[0];
  const rows = [...body.rows].map((row) => [value(row, column), row]);
  rows.sort(([a], [b]) => (a === "") - (b === "") || (down ? compare(b, a) : compare(a, b)));
  body.append(...rows.map(([, row]) => row));
  [...table.tHead.rows[0].cells].forEach((cell) => cell.removeAttribute("aria-sort"));
  table.tHead.rows[0].cells[column].setAttribute("aria-sort", down ? "descending" : "ascending");
}
for (const table of document.querySelectorAll("table[id]")) {
  [...table.tHead.rows[0].cells].forEach((cell, column) => {
    cell.querySelector("button").addEventListener("click", () => {
      const down = cell.getAttribute("aria-sort") !== "descending";
      sort(table, column, down);
      history.replaceState(null, "", `#sort=${table.id}.${column}.${down ? "down" : "up"}`);
    });
  });
}
const requested = /^#sort=([a-z]+)\.(\d+)\.(down|up)$/.exec(location.hash);
const heading = requested && document.getElementById(requested[1])?.tHead.rows[0].cells[Number(requested[2])];
if (heading) {
  for (let clicks = requested[3] === "down" ? 1 : 2; clicks > 0; clicks -= 1) heading.querySelector("button").click();
}
