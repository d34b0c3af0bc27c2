for (const figure of document.querySelectorAll(".chart:has(script)")) {
  const data = JSON.parse(figure.querySelector("script").textContent);
  const svg = figure.querySelector("svg"), cursor = figure.querySelector(".cursor"), tip = figure.querySelector(".tip");
  const plot = data.right - data.left;
  const nearest = (points, x) => points.reduce((a, b) => (Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a));
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * data.width;
    const x = Math.min(data.steps, Math.max(1, Math.round(((at - data.left) / plot) * data.steps + 0.5)));
    const stage = data.stages.filter((s) => s[1] <= x).pop();
    const lines = data.series.map(([name, , points]) => `${name}  ${nearest(points, x)[1]}`);
    tip.textContent = [`${stage[0]}, step ${x - stage[1] + stage[2]}`, ...lines].join("\n");
    const px = data.left + ((x - 0.5) / data.steps) * plot;
    cursor.setAttribute("x1", px);
    cursor.setAttribute("x2", px);
    cursor.style.opacity = 0.35;
    tip.style.display = "block";
    const left = (px / data.width) * box.width + box.left - figure.getBoundingClientRect().left;
    tip.style.left = `${left > box.width / 2 ? left - tip.offsetWidth - 10 : left + 14}px`;
    tip.style.top = "46px";
  });
  svg.addEventListener("pointerleave", () => {
    cursor.style.opacity = 0;
    tip.style.display = "none";
  });
}

// Tables are sorted by a column when its title is chosen: largest first, then smallest first, then as they were.
// What is sorted are rows, or groups of rows (by their last row, which is the newest stage).
const UNITS = { K: 1e3, M: 1e6, G: 1e9, T: 1e12 };

function valueOf(cell) {
  const text = cell.textContent.trim();
  const match = /^(-?[\d,]*\.?\d+(?:e-?\d+)?)([KMGT]?)(?:\D.*)?$/.exec(text);
  return match ? Number(match[1].replaceAll(",", "")) * (UNITS[match[2]] ?? 1) : text;
}

function compare(a, b) {
  const kinds = [a, b].map((value) => (typeof value === "number" ? 0 : value === "–" || value === "" ? 2 : 1));
  if (kinds[0] !== kinds[1]) return { fixed: kinds[0] - kinds[1] };
  return { by: kinds[0] === 0 ? b - a : a.localeCompare(b, "en") };
}

for (const table of document.querySelectorAll(".scroll table")) {
  const titles = [...table.tHead.rows[0].cells];
  const bodies = [...table.tBodies];
  const units = bodies.length > 1 ? bodies : [...(bodies[0]?.rows ?? [])];
  if (units.length < 2) continue;
  const cellOf = (unit, column) => {
    const rows = unit.rows ? [...unit.rows] : [unit];
    const cells = (column === 0 ? rows[0] : rows.at(-1)).cells;
    return cells[column === 0 ? 0 : cells.length - titles.length + column]; // a title over several rows is only in the first
  };
  titles.forEach((title, column) => {
    if (!title.textContent.trim()) return;
    const button = document.createElement("button");
    button.type = "button";
    button.append(...title.childNodes);
    title.append(button);
    button.addEventListener("click", () => {
      const next = { descending: "ascending", ascending: null }[title.getAttribute("aria-sort")];
      const order = next === undefined ? "descending" : next;
      for (const other of titles) other.removeAttribute("aria-sort");
      if (order) title.setAttribute("aria-sort", order);
      const keyed = units.map((unit) => [valueOf(cellOf(unit, column)), unit]);
      if (order) {
        keyed.sort(([a], [b]) => {
          const { fixed, by } = compare(a, b);
          return fixed ?? (order === "descending" ? by : -by);
        });
      }
      for (const [, unit] of keyed) unit.parentNode.append(unit);
    });
  });
}
