// Two images, their distance, and whether it counts as the same at a false accept rate.

import { ask, base64, picture, Refused, useKey } from "./api.js";
import { Chart } from "./chart.js";

const NEAREST = 8;
const AGAIN_MS = 5000;
const at = (id) => document.getElementById(id);
const chart = new Chart(at("chart"));

const chosen = { a: null, b: null }; // { file, text: a promise of base64, url }
let calibration = null;
let stops = []; // thresholds that the slider may stand at: { threshold, far, frr, point }
let stop = null;
let distance = null;
let comparison = 0;
let searching = 0;

// --- the model and its calibration ---

async function start() {
  try {
    const ready = await ask("readyz");
    at("served").textContent = `${ready.model} · ${ready.dim} dimensions · ${ready.image_size} px`;
  } catch (error) {
    at("served").textContent = error.status === 503 ? "No model is served yet; looking again…" : error.message;
    setTimeout(start, AGAIN_MS);
    return false;
  }
  return guarded(async () => {
    await loadCalibration();
    await loadGalleries();
    await Promise.all([compare(), search()]);
  });
}

async function loadCalibration() {
  calibration = await ask("v1/calibration").catch((error) => {
    if (error.status === 404) return null; // no operating points: a threshold alone decides
    throw error;
  });
  stops = stopsOf(calibration);
  chart.show({ histograms: calibration?.histograms ?? null, points: calibration?.operating_points ?? [] });
  showPoints();
  const usual = stops.findIndex((each) => each.point && each.point.far_target === calibration.default_far);
  stand(usual < 0 ? Math.floor(stops.length / 2) : usual);
}

function stopsOf(used) {
  if (!used) return Array.from({ length: 101 }, (_, step) => ({ threshold: step / 50, far: null, frr: null }));
  const found = used.operating_points.map((point) => ({ ...point, point }));
  if (used.histograms) {
    // At the edges of bins the counts are exact, so rates there are as true as those of the points, without intervals.
    const { edges, positives, negatives } = used.histograms;
    const sum = (counts) => counts.reduce((a, b) => a + b, 0);
    let accepted = 0;
    let kept = 0;
    negatives.forEach((count, bin) => {
      accepted += count;
      kept += positives[bin];
      const threshold = edges[bin + 1];
      if (used.operating_points.some((point) => Math.abs(point.threshold - threshold) < 0.002)) return;
      found.push({ threshold, far: accepted / sum(negatives), frr: 1 - kept / sum(positives) });
    });
  }
  return found.sort((one, other) => one.threshold - other.threshold);
}

function showPoints() {
  const points = [...(calibration?.operating_points ?? [])].reverse();
  at("points").replaceChildren(
    ...points.map((point) => {
      const button = made("button", { type: "button" }, percent(point.far_target));
      button.addEventListener("click", () => stand(stops.findIndex((each) => each.point === point)));
      return button;
    }),
  );
  at("calibration").hidden = !points.length;
  at("key-positives").hidden = at("key-negatives").hidden = !calibration?.histograms;
  at("rows").replaceChildren(
    ...points.map((point) => {
      const row = made("tr");
      row.append(made("th", { scope: "row" }, percent(point.far_target)));
      const cells = [point.threshold.toFixed(4), percent(point.far), between(point.far_interval)];
      for (const cell of [...cells, percent(point.frr), between(point.frr_interval)]) row.append(made("td", {}, cell));
      return row;
    }),
  );
  if (!calibration) return;
  const { negatives, positives } = points[0];
  const pairs = `${positives.toLocaleString("en")} pairs of one class, ${negatives.toLocaleString("en")} of two`;
  const from = calibration.created ? `made from ${calibration.source}` : `registered with the model: ${pairs}`;
  at("source").textContent = `Calibration ${calibration.id}, ${from}. Intervals are over classes.`;
}

// --- the slider ---

function stand(index) {
  stop = Math.min(Math.max(index, 0), stops.length - 1);
  const { threshold, far, point } = stops[stop];
  const slider = at("slider");
  slider.value = threshold;
  const rate = point ? percent(point.far_target) : far === null ? "not known" : about(far);
  slider.setAttribute("aria-valuetext", `${rate}, threshold ${threshold.toFixed(3)}`);
  at("rates").textContent = ratesOf(stops[stop]);
  for (const [index, button] of [...at("points").children].entries()) {
    const points = calibration.operating_points;
    button.setAttribute("aria-pressed", String(point === points[points.length - 1 - index]));
  }
  chart.show({ threshold });
  decide();
  for (const hit of at("hits").children) markHit(hit);
}

function ratesOf({ far, frr, point }) {
  if (far === null) return "This model has no operating points, so what a threshold does is not known.";
  if (!point) {
    return `${about(far)} of different pairs accepted, ${percent(frr)} of same pairs rejected, `
      + "counted on the calibration pairs; not a calibrated point, so without intervals.";
  }
  const interval = (ends) => (ends ? ` (95%: ${between(ends)})` : "");
  return `Set for ${percent(point.far_target)}: on the calibration pairs ${percent(far)}${interval(point.far_interval)} of `
    + `different pairs accepted, ${percent(frr)}${interval(point.frr_interval)} of same pairs rejected.`;
}

at("slider").addEventListener("input", (event) => {
  const wanted = Number(event.target.value);
  const far = (each) => Math.abs(each.threshold - wanted);
  stand(stops.reduce((best, each, index) => (far(each) < far(stops[best]) ? index : best), 0));
});

at("slider").addEventListener("keydown", (event) => {
  const points = stops.flatMap((each, index) => (each.point ? [index] : []));
  const moves = {
    ArrowRight: () => stop + 1,
    ArrowUp: () => stop + 1,
    ArrowLeft: () => stop - 1,
    ArrowDown: () => stop - 1,
    PageUp: () => points.find((index) => index > stop) ?? stops.length - 1,
    PageDown: () => points.findLast((index) => index < stop) ?? 0,
    Home: () => 0,
    End: () => stops.length - 1,
  };
  if (!moves[event.key] || !stops.length) return;
  event.preventDefault();
  stand(moves[event.key]());
});

// --- the pair ---

async function compare() {
  const mine = ++comparison;
  distance = null;
  chart.show({ distance });
  decide();
  if (!chosen.a || !chosen.b || stop === null) return;
  say("Comparing…", "");
  at("decision").setAttribute("aria-busy", "true");
  try {
    const [a, b] = await Promise.all([chosen.a.text, chosen.b.text]);
    const answer = await ask("v1/verify", { a, b, threshold: Math.min(stops[stop].threshold, 2) });
    if (mine !== comparison) return; // another image was chosen meanwhile
    if (answer.calibration !== (calibration?.id ?? null)) await loadCalibration();
    if (mine !== comparison) return;
    distance = answer.distance;
    chart.show({ distance });
  } catch (error) {
    const named = (_, side, verb) => `The ${side === "a" ? "first" : "second"} image ${verb}`;
    if (error instanceof Refused) error.message = error.message.replace(/^(a|b) (is|has)\b/, named);
    throw error;
  } finally {
    if (mine === comparison) {
      at("decision").removeAttribute("aria-busy");
      decide();
    }
  }
}

function decide() {
  const verdict = at("verdict");
  if (distance === null || stop === null) {
    verdict.className = "";
    if (chosen.a && chosen.b) say("No answer", "This pair was not compared.");
    else say("No pair yet", `Give ${chosen.a || chosen.b ? "a second image" : "two images"} to see how far apart they are.`);
    return;
  }
  const { threshold } = stops[stop];
  const match = distance <= threshold;
  verdict.className = match ? "match" : "other";
  const far = match ? "within" : "beyond";
  say(match ? "Same" : "Not the same", `${distance.toFixed(3)} apart, ${far} the threshold of ${threshold.toFixed(3)}.`);
  const spoken = `${match ? "Same" : "Not the same"}, ${distance.toFixed(3)} apart.`;
  if (at("spoken").textContent !== spoken) at("spoken").textContent = spoken;
}

function say(word, why) {
  at("word").textContent = word;
  at("why").textContent = why;
}

// --- choosing images ---

function choose(side, file) {
  if (file.type && !file.type.startsWith("image/")) {
    trouble(`${file.name} is no image`);
    return;
  }
  forget(side);
  trouble("");
  const url = URL.createObjectURL(file);
  chosen[side] = { file, url, text: base64(file) };
  chosen[side].text.catch(() => {}); // said where it is awaited
  const image = at(`image-${side}`);
  image.src = url;
  image.alt = file.name;
  image.hidden = false;
  image.onerror = () => { image.hidden = true; }; // a format that the service reads and this browser does not
  at(`name-${side}`).textContent = file.name;
  at(`remove-${side}`).hidden = false;
  at(`slot-${side}`).classList.add("filled");
  guarded(() => Promise.all([compare(), side === "a" ? search() : null]));
}

function forget(side) {
  if (!chosen[side]) return;
  URL.revokeObjectURL(chosen[side].url);
  chosen[side] = null;
  const image = at(`image-${side}`);
  image.removeAttribute("src");
  image.hidden = true;
  at(`file-${side}`).value = "";
  at(`name-${side}`).textContent = "";
  at(`remove-${side}`).hidden = true;
  at(`slot-${side}`).classList.remove("filled");
}

function take(files, side) {
  const images = [...files].slice(0, 2);
  if (images.length === 2) images.forEach((file, index) => choose("ab"[index], file));
  else if (images.length) choose(side ?? (chosen.a ? "b" : "a"), images[0]);
}

for (const side of ["a", "b"]) {
  at(`file-${side}`).addEventListener("change", (event) => {
    if (event.target.files.length) choose(side, event.target.files[0]);
  });
  at(`remove-${side}`).addEventListener("click", () => {
    forget(side);
    at(`file-${side}`).focus();
    guarded(() => Promise.all([compare(), side === "a" ? search() : null]));
  });
}
document.addEventListener("paste", (event) => {
  const slot = document.activeElement.closest(".slot");
  take(event.clipboardData.files, slot ? slot.id.at(-1) : null);
});
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  const over = event.target.closest?.(".slot");
  for (const slot of document.querySelectorAll(".slot")) slot.classList.toggle("over", slot === over);
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  for (const slot of document.querySelectorAll(".slot")) slot.classList.remove("over");
  take(event.dataTransfer.files, event.target.closest?.(".slot")?.id.at(-1));
});

// --- galleries ---

async function loadGalleries() {
  const listed = await ask("v1/galleries").catch((error) => {
    if ([404, 405, 501].includes(error.status)) return null; // this service keeps none
    throw error;
  });
  at("nearest").hidden = !listed?.data.length;
  const options = (listed?.data ?? []).map((gallery) => {
    const option = made("option", { value: gallery.name }, gallery.name);
    option.dataset.images = gallery.keep_images ? "kept" : "";
    return option;
  });
  at("gallery").replaceChildren(...options);
}

async function search() {
  const mine = ++searching;
  const [option] = at("gallery").selectedOptions;
  for (const image of at("hits").querySelectorAll("img")) URL.revokeObjectURL(image.src);
  at("hits").replaceChildren();
  at("found").textContent = "Give a first image to search with.";
  if (!option || !chosen.a || stop === null) return;
  at("found").textContent = "Searching…";
  try {
    const query = await chosen.a.text;
    const threshold = Math.min(stops[stop].threshold, 2);
    const found = await ask("v1/search", { gallery: option.value, query, k: NEAREST, threshold });
    if (mine !== searching) return;
    at("found").textContent = found.data.length
      ? `The ${found.data.length} nearest to the first image.`
      : "The gallery is empty.";
    at("hits").replaceChildren(...found.data.map((hit) => hitOf(hit, option)));
  } catch (error) {
    if (!(error instanceof Refused) || error.status === 401 || error.status === 403) throw error;
    if (mine === searching) at("found").textContent = error.message;
  }
}

function hitOf(hit, option) {
  const item = made("li");
  item.dataset.distance = hit.distance;
  const frame = made("div", { class: "thumb" });
  if (option.dataset.images) {
    const path = `v1/galleries/${option.value}/items/${encodeURIComponent(hit.id)}/image`;
    picture(path).then((url) => url && frame.append(made("img", { src: url, alt: "" }))).catch(() => {});
  }
  const words = Object.entries(hit.metadata ?? {}).map(([name, value]) => `${name}: ${plain(value)}`).join(" · ");
  item.append(
    frame,
    made("strong", { class: "id" }, hit.id),
    made("span", { class: "metadata" }, words),
    made("span", { class: "distance" }, hit.distance.toFixed(3)),
    made("span", { class: "mark" }),
  );
  markHit(item);
  return item;
}

function markHit(item) {
  const match = Number(item.dataset.distance) <= stops[stop].threshold;
  item.classList.toggle("match", match);
  item.querySelector(".mark").textContent = match ? "same" : "not the same";
}

at("gallery").addEventListener("change", () => guarded(search));

// --- keys and troubles ---

/** Does the work; says what the service refused, and asks for a key when that is why. True when all went well. */
async function guarded(work) {
  try {
    await work();
    return true;
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    const locked = error.status === 401 || error.status === 403;
    if (locked && at("unlock").hidden) {
      at("unlock").hidden = false;
      at("key").focus();
    } else {
      trouble(error.message);
    }
    return false;
  }
}

function trouble(message) {
  at("trouble").textContent = message;
  at("trouble").hidden = !message;
}

at("unlock").addEventListener("submit", async (event) => {
  event.preventDefault();
  useKey(at("key").value.trim());
  trouble("");
  if (!(await start())) return;
  at("unlock").hidden = true;
  at("file-a").focus();
});

// --- words ---

const rounded = (value) => String(Number(value.toPrecision(2)));
const percent = (rate) => `${rounded(rate * 100)}%`;
const between = (ends) => (ends ? `${percent(ends[0])} to ${percent(ends[1])}` : "");
const plain = (value) => (typeof value === "object" ? JSON.stringify(value) : String(value));

function about(far) {
  if (far > 0) return percent(far);
  const { negatives } = calibration.operating_points[0];
  return `none of ${negatives.toLocaleString("en")}`;
}

function made(name, attributes = {}, words = "") {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.textContent = words;
  return element;
}

start();
