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
