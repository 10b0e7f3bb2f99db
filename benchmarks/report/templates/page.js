"use strict";
(() => {
  const root = document.documentElement;
  root.classList.add("js");

  // The reader's choice of theme; without one the page follows the system.
  const button = document.getElementById("theme");
  const themes = ["system", "light", "dark"];
  const remembered = () => { try { return localStorage.getItem("apm-report-theme"); } catch { return null; } };
  const apply = (theme) => {
    if (theme === "system") root.removeAttribute("data-theme");
    else root.setAttribute("data-theme", theme);
    button.textContent = "Theme: " + theme;
    button.dataset.theme = theme;
  };
  apply(themes.includes(remembered()) ? remembered() : "system");
  button.hidden = false;
  button.addEventListener("click", () => {
    const theme = themes[(themes.indexOf(button.dataset.theme) + 1) % themes.length];
    apply(theme);
    try { localStorage.setItem("apm-report-theme", theme); } catch { /* not remembered, then */ }
  });

  // Sorting: first from the largest number, or from A; then the other way. What has no number stays last.
  const numberIn = (text) => {
    const found = /-?\d+(\.\d+)?(e[+-]?\d+)?/i.exec(text.replace(/−/g, "-"));
    return found ? Number(found[0]) : NaN;
  };
  const sort = (heading) => {
    const numeric = heading.classList.contains("num");
    const first = numeric ? "descending" : "ascending";
    const direction = heading.getAttribute("aria-sort") === first ? (numeric ? "ascending" : "descending") : first;
    for (const other of heading.parentElement.children) other.setAttribute("aria-sort", "none");
    heading.setAttribute("aria-sort", direction);
    const sign = direction === "ascending" ? 1 : -1;
    const body = heading.closest("table").tBodies[0];
    const value = (row) => row.cells[heading.cellIndex].textContent.trim();
    const compare = (a, b) => {
      if (!numeric) return sign * value(a).localeCompare(value(b), undefined, { numeric: true });
      const [x, y] = [numberIn(value(a)), numberIn(value(b))];
      if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);
      return sign * (x - y);
    };
    body.append(...[...body.rows].sort(compare));
  };
  // Charts: what the pointer or the arrow keys reach is told below the chart.
  for (const chart of document.querySelectorAll("figure svg")) {
    const marks = [...chart.querySelectorAll(".said")];
    const line = chart.closest("figure").querySelector(".told");
    const tell = (event) => { line.textContent = event.currentTarget.getAttribute("aria-label"); };
    for (const mark of marks) {
      mark.addEventListener("pointerenter", tell);
      mark.addEventListener("focus", tell);
    }
    chart.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (!step || !marks.length) return;
      event.preventDefault();
      const at = marks.indexOf(document.activeElement);
      const next = at < 0 ? (step > 0 ? 0 : marks.length - 1) : (at + step + marks.length) % marks.length;
      marks[next].focus();
    });
  }
  for (const one of document.querySelectorAll("th > button")) {
    one.addEventListener("click", () => sort(one.parentElement));
  }
})();
