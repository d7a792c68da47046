"use strict";
(() => {
  const root = document.documentElement;
  const toggle = document.querySelector("button.theme");
  const dark = () => (root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  const named = () => { toggle.textContent = dark() ? "Light" : "Dark"; toggle.setAttribute("aria-label", `Show in ${dark() ? "light" : "dark"} colours`); };
  toggle.hidden = false;
  toggle.addEventListener("click", () => { root.dataset.theme = dark() ? "light" : "dark"; named(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", named);
  named();

  // A link to a folded section opens it, and paper gets all of them.
  const folds = [...document.querySelectorAll("details.fold")];
  const reveal = () => { const at = location.hash && document.getElementById(location.hash.slice(1)); if (at) for (const one of at.querySelectorAll("details.fold")) one.open = true; };
  addEventListener("hashchange", reveal);
  for (const link of document.querySelectorAll('nav a')) link.addEventListener("click", () => setTimeout(reveal));
  reveal();
  let closed = [];
  addEventListener("beforeprint", () => { closed = folds.filter((one) => !one.open); for (const one of closed) one.open = true; });
  addEventListener("afterprint", () => { for (const one of closed) one.open = false; });

  const key = (row, column) => row.cells[column].dataset.v;
  const compare = (column, numeric, up) => (a, b) => {
    const x = key(a, column), y = key(b, column);
    // What is missing stays at the end, whichever way the rest is sorted.
    if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
    return (numeric ? x - y : x.localeCompare(y, "en", { numeric: true })) * (up ? 1 : -1);
  };

  for (const table of document.querySelectorAll("table.sortable")) {
    const body = table.tBodies[0];
    const panel = document.querySelector(`[data-filters="${table.id}"]`);
    const limit = Number(table.dataset.first || Infinity);
    let everything = false;

    const show = () => {
      const wanted = panel ? [...panel.querySelectorAll("[data-by]")].map((field) =>
        [field.dataset.by, ("value" in field ? field.value : field.querySelector("input:checked").value).trim().toLowerCase()]) : [];
      const matching = [...body.rows].filter((row) => wanted.every(([by, value]) => !value ||
        (by === "text" ? row.textContent.toLowerCase().includes(value) : row.dataset[by].toLowerCase() === value)));
      const kept = new Set(everything ? matching : matching.slice(0, limit));
      for (const row of body.rows) row.hidden = !kept.has(row);
      if (!panel) return;
      panel.querySelector(".count").textContent = `${kept.size} of ${matching.length} rows` + (matching.length < body.rows.length ? ` (${body.rows.length} unfiltered)` : "");
      const more = panel.querySelector(".more");
      more.hidden = matching.length <= limit;
      more.textContent = everything ? `Show the first ${limit}` : `Show all ${matching.length}`;
    };

    for (const [column, head] of [...table.tHead.rows[0].cells].entries()) {
      const button = head.querySelector("button");
      if (!button) continue;
      button.addEventListener("click", () => {
        const now = head.getAttribute("aria-sort");
        const up = now ? now !== "ascending" : head.dataset.best !== "high";
        for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        body.append(...[...body.rows].sort(compare(column, head.classList.contains("n"), up)));
        show();
      });
    }
    if (panel) {
      panel.hidden = false;
      for (const field of panel.querySelectorAll("[data-by]")) field.addEventListener("input", show);
      panel.querySelector(".more").addEventListener("click", () => { everything = !everything; show(); });
    }
    show();
  }
})();
