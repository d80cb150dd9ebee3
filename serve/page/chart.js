// The axis of distances: calibration histograms behind, the operating points, the threshold, and the pair.

const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 230;
const BASE = 190; // where the axis lies
const TOP = 34;
export const PAD = 14; // half of the slider's thumb, so that the thumb stands beneath the line
const FARTHEST = 2;

export class Chart {
  constructor(place) {
    this.place = place;
    this.state = { histograms: null, points: [], threshold: null, distance: null };
    new ResizeObserver(() => this.draw()).observe(place);
  }

  show(changes) {
    Object.assign(this.state, changes);
    this.draw();
  }

  draw() {
    const width = Math.max(this.place.clientWidth, 240);
    const { histograms, points, threshold, distance } = this.state;
    const x = (value) => PAD + (value / FARTHEST) * (width - 2 * PAD);
    const svg = element("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, width, height: HEIGHT, role: "img" });
    svg.setAttribute("aria-label", described(this.state));
    if (threshold !== null) {
      svg.append(element("rect", { class: "accepted", x: x(0), y: TOP, width: x(threshold) - x(0), height: BASE - TOP }));
    }
    if (histograms) svg.append(...areas(histograms, x));
    svg.append(...axis(x, width));
    for (const point of points) {
      const at = x(Math.min(point.threshold, FARTHEST));
      svg.append(element("path", { class: "point", d: `M${at} ${BASE - 5}l5 9h-10z` }));
    }
    if (threshold !== null) svg.append(...line(x(threshold), width, threshold));
    if (distance !== null) svg.append(...pin(x(distance), width, distance, threshold === null || distance <= threshold));
    this.place.replaceChildren(svg);
  }
}

function described({ histograms, points, threshold, distance }) {
  const said = ["Distances from 0 to 2."];
  if (histograms) said.push("Behind, how far apart calibration pairs of one class and of two classes are.");
  if (points.length) said.push(`Calibrated thresholds at ${points.map((p) => p.threshold.toFixed(3)).join(", ")}.`);
  if (threshold !== null) said.push(`The threshold is at ${threshold.toFixed(3)}.`);
  if (distance !== null) said.push(`This pair is at ${distance.toFixed(3)}.`);
  return said.join(" ");
}

function areas({ edges, positives, negatives }, x) {
  const share = (counts) => {
    const sum = counts.reduce((a, b) => a + b, 0) || 1;
    return counts.map((count) => count / sum);
  };
  const shapes = { negatives: share(negatives), positives: share(positives) };
  const highest = Math.max(...shapes.positives, ...shapes.negatives) || 1;
  return Object.entries(shapes).map(([name, heights]) => {
    let path = `M${x(edges[0])} ${BASE}`;
    heights.forEach((height, bin) => {
      const y = BASE - (height / highest) * (BASE - TOP - 10);
      path += `L${x(edges[bin])} ${y}L${x(edges[bin + 1])} ${y}`;
    });
    return element("path", { class: name, d: `${path}L${x(edges.at(-1))} ${BASE}Z` });
  });
}

function axis(x, width) {
  const parts = [element("path", { class: "axis", d: `M${x(0)} ${BASE}H${x(FARTHEST)}` })];
  const step = width < 480 ? 0.5 : 0.25;
  for (let value = 0; value <= FARTHEST; value += step) {
    parts.push(element("path", { class: "axis", d: `M${x(value)} ${BASE}v5` }));
    parts.push(element("text", { class: "tick", x: x(value), y: BASE + 20, "text-anchor": "middle" }, String(value)));
  }
  const note = (at, anchor, words) =>
    element("text", { class: "tick", x: at, y: BASE + 37, "text-anchor": anchor }, words);
  return [...parts, note(x(0), "start", "the same"), note(x(FARTHEST), "end", "opposite")];
}

function line(at, width, threshold) {
  return [
    element("path", { class: "threshold", d: `M${at} ${TOP - 14}V${HEIGHT}` }),
    label("threshold-label", at, width, 14, `threshold ${threshold.toFixed(3)}`),
  ];
}

function pin(at, width, distance, match) {
  const kind = match ? "match" : "other";
  return [
    element("path", { class: `stem ${kind}`, d: `M${at} ${TOP + 22}V${BASE}` }),
    element("circle", { class: `pin ${kind}`, cx: at, cy: BASE, r: 7 }),
    label(`pair-label ${kind}`, at, width, TOP + 14, `this pair ${distance.toFixed(3)}`),
  ];
}

function label(kind, at, width, y, words) {
  const half = words.length * 3.9 + 4; // about half as wide as it is drawn: it must not leave the chart
  const x = Math.min(Math.max(at, half), width - half);
  return element("text", { class: kind, x, y, "text-anchor": "middle" }, words);
}

function element(name, attributes, words) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (words !== undefined) made.textContent = words;
  return made;
}
