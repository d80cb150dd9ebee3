"use strict";
(() => {
  const { night, figures } = JSON.parse(document.getElementById("figures-json").textContent);
  const colours = new Map(Object.entries(night));
  const dark = matchMedia("(prefers-color-scheme: dark)");
  // On a touch screen a finger on a figure scrolls the page.
  const dragmode = matchMedia("(pointer: coarse)").matches ? false : "zoom";

  function painted(part, atNight) {
    if (typeof part === "string") return (atNight && colours.get(part)) || part;
    if (Array.isArray(part)) return part.map((inner) => painted(inner, atNight));
    if (part === null || typeof part !== "object") return part;
    return Object.fromEntries(Object.entries(part).map(([name, inner]) => [name, painted(inner, atNight)]));
  }

  function draw(atNight) {
    for (const [id, figure] of Object.entries(figures)) {
      const { data, layout } = painted(figure, atNight);
      Plotly.react(id, data, { ...layout, dragmode }, { displayModeBar: false, responsive: true });
    }
  }

  draw(dark.matches);
  dark.addEventListener("change", () => draw(dark.matches));
  addEventListener("beforeprint", () => draw(false));
  addEventListener("afterprint", () => draw(dark.matches));
})();
