"use strict";
// One page, one state: sliders change it, and everything that depends on it is drawn again.
(() => {
  const stored = (id) => JSON.parse(document.getElementById(`${id}_data`).textContent);
  const byId = (id) => document.getElementById(id);
  const record = stored("record"), pictures = stored("pictures"), look = stored("look");
  const cases = record.cases, rates = record.rates;
  const BATCH = 24; // pictures that are added at once
  const scale = rates.threshold > 0 ? rates.threshold : 1; // of the colors, see bundle.results.heat
  const state = { opacity: 0.6, threshold: rates.threshold ?? 0, limit: rates.image_threshold, truth: true, batch: BATCH };
  const views = {};

  const short = (value, digits = 3) => (value === null || value === undefined ? "not known" : String(Number(value.toPrecision(digits))));
  const percent = (share) => `${short(100 * share)}\u00a0%`;
  const isAbove = (one) => state.limit !== null && one.score > state.limit;
  const byte = (z) => 255 * (1 - 2 ** (-Math.max(z, 0) / scale));

  // ---- pictures ----
  const decoded = new Map();
  const decode = (uri) => {
    if (!decoded.has(uri)) {
      const image = new Image();
      image.src = uri;
      decoded.set(uri, image.decode().then(() => image));
    }
    return decoded.get(uri);
  };
  const pixelsOf = (image, width, height, smooth) => {
    const canvas = new OffscreenCanvas(width, height), context = canvas.getContext("2d", { willReadFrequently: true });
    context.imageSmoothingEnabled = smooth;
    context.imageSmoothingQuality = "high";
    context.drawImage(image, 0, 0, width, height);
    return context.getImageData(0, 0, width, height);
  };
  const isEdge = (inside, at, width, length) =>
    inside(at) && !(at % width && inside(at - 1) && (at + 1) % width && inside(at + 1) && at >= width && inside(at - width) && at + width < length && inside(at + width));

  async function draw(canvas, frame, picture, largest) {
    const turn = (canvas.turn = (canvas.turn ?? 0) + 1);
    const [image, map, truth] = await Promise.all([frame.image, frame.map, frame.truth].map((uri) => uri && decode(uri)));
    if (turn !== canvas.turn) return; // another slice or slider came meanwhile
    const zoom = Math.max(1, Math.round(largest / Math.max(image.naturalWidth, image.naturalHeight)));
    const width = zoom * image.naturalWidth, height = zoom * image.naturalHeight;
    const base = pixelsOf(image, width, height, true), heat = pixelsOf(map, width, height, true).data;
    const lesion = truth && state.truth ? pixelsOf(truth, width, height, false).data : null;
    const limit = byte(state.threshold), data = base.data, length = width * height;
    const called = (at) => heat[4 * at] > limit, wrong = (at) => lesion[4 * at] > 127;
    for (let at = 0; at < length; at += 1) {
      const place = 4 * at, value = heat[place], opacity = (state.opacity * value) / 255, color = look.colors[value];
      for (let band = 0; band < 3; band += 1) data[place + band] = (1 - opacity) * data[place + band] + opacity * color[band];
      if (isEdge(called, at, width, length)) data.set(look.outline, place);
      if (lesion && isEdge(wrong, at, width, length)) data.fill(((at % width) + Math.floor(at / width)) % 6 < 3 ? 255 : 0, place, place + 3);
    }
    canvas.width = width;
    canvas.height = height;
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.putImageData(base, 0, 0);
    if (largest > 300) annotate(context, picture, width, height);
  }

  function annotate(context, picture, width, height) {
    context.font = "15px system-ui, sans-serif";
    context.lineWidth = 3;
    context.strokeStyle = "#000";
    context.fillStyle = "#fff";
    const write = (text, x, y, align, baseline) => {
      context.textAlign = align;
      context.textBaseline = baseline;
      context.strokeText(text, x, y);
      context.fillText(text, x, y);
    };
    const [left, right, above, below] = picture.edges;
    if (left) {
      write(left, 4, height / 2, "left", "middle");
      write(right, width - 4, height / 2, "right", "middle");
      write(above, width / 2, 4, "center", "top");
      write(below, width / 2, height - 4, "center", "bottom");
    }
    if (picture.millimeters) {
      const most = picture.millimeters / 3, power = 10 ** Math.floor(Math.log10(most));
      const length = Math.max(...[1, 2, 5].map((step) => step * power).filter((one) => one <= most));
      const wide = (length / picture.millimeters) * width;
      context.fillRect(8, height - 12, wide, 3);
      write(`${short(length)} mm`, 8, height - 15, "left", "bottom");
    }
  }

  const orders = {
    "highest scores": (some) => some.toSorted((a, b) => b.score - a.score),
    "lowest scores": (some) => some.toSorted((a, b) => a.score - b.score),
  };
  if (record.of_cases) {
    const ofClass = (label, from) => (some) => orders[from](some.filter((one) => one.label === label));
    orders["anomalous, lowest scores"] = ofClass(1, "lowest scores");
    orders["anomalous, highest scores"] = ofClass(1, "highest scores");
    orders["healthy, highest scores"] = ofClass(0, "highest scores");
    orders["anomalous, below the threshold"] = (some) => ofClass(1, "lowest scores")(some).filter((one) => !isAbove(one));
    orders["healthy, above the threshold"] = (some) => ofClass(0, "highest scores")(some).filter(isAbove);
  }
  if (cases.some((one) => one.like === false)) orders["unlike the training data"] = (some) => orders["highest scores"](some.filter((one) => one.like === false));

  const kind = (one) => (one.label === null ? "" : one.label ? "anomalous, " : "healthy, ");
  const says = (one) => `${kind(one)}score ${short(one.score)}${state.limit === null ? "" : isAbove(one) ? ", above" : ", below"}${one.like === false ? ", unlike" : ""}`;

  function fillGallery() {
    const gallery = byId("gallery");
    if (!gallery) return;
    const chosen = orders[byId("order").value](cases.filter((one) => Object.hasOwn(pictures, one.name)));
    gallery.replaceChildren(...chosen.slice(0, state.batch).map((one) => {
      const item = document.createElement("li"), button = document.createElement("button"), canvas = document.createElement("canvas");
      const name = document.createElement("span"), line = document.createElement("span");
      button.type = "button";
      button.dataset.name = one.name;
      canvas.role = "img";
      canvas.ariaLabel = `Image under its anomaly map, ${one.name}`;
      name.className = "name";
      name.textContent = one.name;
      line.className = "says";
      line.textContent = says(one);
      button.append(canvas, name, line);
      button.addEventListener("click", () => openViewer(one));
      item.append(button);
      return item;
    }));
    byId("more").hidden = chosen.length <= state.batch;
    byId("shown_count").textContent = `${Math.min(chosen.length, state.batch)} of ${chosen.length} pictures; the page has pictures of ${Object.keys(pictures).length} of ${cases.length + record.left_out} cases`;
    drawGallery();
  }
  function drawGallery() {
    return Promise.all(Array.from(byId("gallery")?.querySelectorAll("button") ?? [], (button) => {
      const picture = pictures[button.dataset.name];
      return draw(button.querySelector("canvas"), picture.frames[picture.start], picture, 256);
    }));
  }

  let viewed = null;
  function openViewer(one) {
    viewed = one;
    const picture = pictures[one.name];
    byId("viewer_name").textContent = one.name;
    byId("slice").max = picture.frames.length - 1;
    byId("slice").value = picture.start;
    byId("slice_label").hidden = picture.frames.length < 2;
    byId("viewer_facts").textContent = `${says(one)}; highest ${record.unit} ${short(one.peak)}; ${percent(one.share)} of the tissue above the threshold of the model${one.slices > 1 ? `; worst slice ${one.slice} of ${one.slices}` : ""}${one.unlike ? `; unlike the training data: ${one.unlike}` : ""}`;
    byId("viewer_files").replaceChildren(...one.files.flatMap((file) => {
      const link = document.createElement("a");
      link.href = `./${file.split("/").map(encodeURIComponent).join("/")}`;
      link.textContent = file.split("/").pop();
      return [link, " "];
    }));
    byId("viewer").showModal();
    drawViewer();
  }
  function drawViewer() {
    if (!viewed || !byId("viewer").open) return;
    const picture = pictures[viewed.name], frame = picture.frames[Number(byId("slice").value)], canvas = byId("viewer_canvas");
    byId("slice_says").textContent = `${frame.slice} of ${viewed.slices}`;
    canvas.ariaLabel = `Slice ${frame.slice} of ${viewed.name} under its anomaly map, threshold ${short(state.threshold)}`;
    draw(canvas, frame, picture, 640);
  }

  // ---- what a threshold means ----
  const at = (points, x) => { // share of values above x, of points in ascending order
    if (!points?.length || x < points[0].above) return points?.length ? points[0].share : null;
    const next = points.findIndex((point) => point.above > x);
    if (next < 0) return points.at(-1).share;
    const [a, b] = [points[next - 1], points[next]];
    return a.share + ((b.share - a.share) * (x - a.above)) / (b.above - a.above);
  };
  const ascending = (points) => points?.toSorted((a, b) => a.above - b.above);
  const ofValidation = ascending(record.validation?.patches);
  const read = (curves, name, x) => { // at the threshold next to x
    const values = curves.thresholds;
    let best = 0;
    values.forEach((value, index) => { if (Math.abs(value - x) < Math.abs(values[best] - x)) best = index; });
    return { index: best, value: curves[name].value[best], low: curves[name].low[best], high: curves[name].high[best] };
  };
  const banded = (found) => `${percent(found.value)} (${percent(found.low)} to ${percent(found.high)})`;

  function explainThreshold() {
    const sentences = [];
    if (record.of_pixels) sentences.push(`Finds ${banded(read(record.of_pixels, "sensitivity", state.threshold))} of the lesion pixels.`);
    const healthy = at(record.patches, state.threshold), validation = at(ofValidation, state.threshold);
    const false_ = [[validation, "validation"], [healthy, "test"]].filter(([share]) => share !== null);
    if (false_.length) sentences.push(`False positives: ${false_.map(([share, of]) => `${percent(share)} of healthy ${of} patches`).join(", ")}.`);
    if (byId("threshold_means")) byId("threshold_means").textContent = sentences.join(" ");
    if (byId("threshold_says")) byId("threshold_says").textContent = `${record.unit} ${short(state.threshold)}`;
  }
  function explainLimit() {
    if (!byId("limit_means") || state.limit === null) return;
    const sentences = [];
    const count = (some, what) => { if (some.length) sentences.push(`${some.filter(isAbove).length} of ${some.length} ${what} above`); };
    count(cases.filter((one) => one.label === null), "inputs");
    count(cases.filter((one) => one.label === 1), "anomalous cases");
    count(cases.filter((one) => one.label === 0), "healthy test cases");
    const kept = record.validation?.scores ?? [];
    if (kept.length) sentences.push(`${percent(kept.filter((score) => score > state.limit).length / kept.length)} of healthy validation cases above`);
    if (record.of_cases && !record.left_out) sentences.push(`sensitivity ${banded(read(record.of_cases, "sensitivity", state.limit))}`);
    byId("limit_means").textContent = `${sentences.join("; ")}.`;
    byId("limit_says").textContent = short(state.limit);
  }

  // ---- charts ----
  const CONFIG = {
    background: null,
    font: "system-ui, sans-serif",
    axis: { labelFontSize: 12, titleFontSize: 12, titleFontWeight: "normal" },
    legend: { orient: "bottom", title: null, labelFontSize: 12, symbolStrokeWidth: 2 },
    view: { stroke: null },
    range: { category: ["#7a7f87", "#3b82c4", "#c2660a"] },
    line: { color: "#3b82c4" }, area: { color: "#3b82c4" }, point: { color: "#3b82c4" },
  };
  const marked = { scores: true, curve: true }; // by the threshold in use
  async function chart(element, name, points, words, titles = [], threshold = []) {
    const named = JSON.stringify(look.charts[name]).replaceAll('"X"', JSON.stringify(titles[0])).replaceAll('"Y"', JSON.stringify(titles[1]));
    const spec = charts.compile({ ...JSON.parse(named), width: "container", autosize: { type: "fit", contains: "padding" }, description: words, config: CONFIG }).spec;
    const view = new charts.View(charts.parse(spec, null, { ast: true }), {
      expr: charts.expressionInterpreter, renderer: "svg", container: element, hover: true, logLevel: charts.Warn,
    });
    if (name in marked) view.data("threshold", threshold);
    await view.data("points", points).runAsync();
    return view;
  }
  function histogram() {
    const groups = [["healthy validation", record.validation?.scores ?? []]];
    const add = (words, label) => groups.push([words, cases.filter((one) => one.label === label).map((one) => one.score)]);
    record.of_cases || cases.some((one) => one.label !== null) ? (add("healthy test", 0), add("anomalous test", 1)) : add("inputs", null);
    const values = groups.flatMap(([, scores]) => scores), low = Math.min(...values), step = (Math.max(...values) - low || 1) / 30;
    return groups.filter(([, scores]) => scores.length).flatMap(([group, scores]) => {
      const counts = new Array(32).fill(0);
      for (const score of scores) counts[Math.min(29, Math.floor((score - low) / step))] += 1;
      return counts.slice(0, 31).map((count, index) => ({ group, x: low + index * step, y: count / scores.length }));
    });
  }
  const TITLES = { roc: ["false positive rate", "sensitivity"], precision_recall: ["recall (sensitivity)", "precision"] };
  async function drawCharts() {
    for (const element of document.querySelectorAll("[data-chart]")) {
      const { chart: name, of, which } = element.dataset, words = element.parentElement.querySelector("figcaption").textContent;
      if (name === "scores") views.scores = await chart(element, name, histogram(), words, [], state.limit === null ? [] : [{ x: state.limit }]);
      if (name === "calibration") await chart(element, name, record.calibration, words);
      if (name === "curve") views[`${of}_${which}`] = await chart(element, name, record[of][which], words, TITLES[which]);
    }
    const names = [...new Set(record.epochs.flatMap((epoch) => Object.keys(epoch)))].filter((name) => name !== "epoch");
    for (const name of names) {
      const figure = document.createElement("figure"), element = document.createElement("div"), words = document.createElement("figcaption");
      element.className = "chart";
      words.textContent = `${name.replaceAll("_", " ")} by epoch`;
      figure.append(element, words);
      byId("epochs").append(figure);
      const points = record.epochs.filter((epoch) => name in epoch).map((epoch) => ({ x: epoch.epoch, y: epoch[name] }));
      await chart(element, "epochs", points, words.textContent, ["epoch", name.replaceAll("_", " ")]);
    }
    markCurves();
  }
  function markCurves() {
    for (const [of, x] of [["of_pixels", state.threshold], ["of_cases", state.limit]]) {
      const curves = record[of];
      if (!curves || x === null) continue;
      const found = read(curves, "sensitivity", x).value, false_ = read(curves, "false_positive_rate", x).value;
      const ranked = curves.precision_recall.reduce((best, point) => (Math.abs(point.x - found) < Math.abs(best.x - found) ? point : best));
      views[`${of}_roc`]?.data("threshold", [{ x: false_, y: found }]).runAsync();
      views[`${of}_precision_recall`]?.data("threshold", [{ x: found, y: ranked.y }]).runAsync();
    }
    if (state.limit !== null) views.scores?.data("threshold", [{ x: state.limit }]).runAsync();
  }

  // ---- the table of cases ----
  function markCases() {
    const table = byId("case_table");
    if (!table) return;
    const find = byId("find").value.toLowerCase(), which = byId("which").value;
    const wanted = {
      "": () => true, above: isAbove, below: (one) => !isAbove(one), unlike: (one) => one.like === false,
      missed: (one) => one.label === 1 && !isAbove(one), alarm: (one) => one.label === 0 && isAbove(one),
    }[which];
    let count = 0;
    for (const row of table.tBodies[0].rows) {
      const one = cases[row.dataset.case];
      row.querySelector(".call").textContent = state.limit === null ? "" : isAbove(one) ? "above" : "below";
      row.hidden = !(wanted(one) && one.name.toLowerCase().includes(find));
      count += !row.hidden;
    }
    for (const row of byId("folder_table")?.tBodies[0].rows ?? []) row.hidden = !row.cells[0].textContent.toLowerCase().includes(find);
    byId("case_count").textContent = `${count} of ${cases.length} cases`;
  }
  function sortBy(button) {
    const heading = button.closest("th"), index = [...heading.parentElement.children].indexOf(heading), body = button.closest("table").tBodies[0];
    const falls = heading.getAttribute("aria-sort") ? heading.getAttribute("aria-sort") === "ascending" : button.dataset.kind === "number";
    const key = (row) => (button.dataset.kind ? Number(row.cells[index].dataset.value) : row.cells[index].textContent);
    const compare = (a, b) => (button.dataset.kind ? key(a) - key(b) : key(a).localeCompare(key(b), "en", { numeric: true }));
    for (const other of heading.parentElement.children) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", falls ? "descending" : "ascending");
    body.append(...[...body.rows].sort((a, b) => (falls ? -compare(a, b) : compare(a, b))));
  }

  // ---- sliders ----
  let waiting = false;
  function changed() { // at most once a frame
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      for (const id of ["opacity", "viewer_opacity"]) if (byId(id)) byId(id).value = state.opacity;
      for (const id of ["threshold", "viewer_threshold"]) if (byId(id)) byId(id).value = state.threshold;
      if (byId("opacity_says")) byId("opacity_says").textContent = percent(state.opacity);
      if (byId("limit") && state.limit !== null) byId("limit").value = state.limit;
      explainThreshold();
      explainLimit();
      markCurves();
      markCases();
      drawGallery();
      drawViewer();
    });
  }
  const on = (id, event, act) => byId(id)?.addEventListener(event, act);
  for (const id of ["threshold", "viewer_threshold"]) {
    if (byId(id)) Object.assign(byId(id), { min: 0, max: 4 * scale, step: scale / 100, value: state.threshold });
    on(id, "input", (event) => { state.threshold = Number(event.target.value); changed(); });
  }
  for (const id of ["opacity", "viewer_opacity"]) on(id, "input", (event) => { state.opacity = Number(event.target.value); changed(); });
  on("truth", "change", (event) => { state.truth = event.target.checked; changed(); });
  on("reset_threshold", "click", () => { state.threshold = rates.threshold ?? 0; changed(); });
  on("reset_limit", "click", () => { state.limit = rates.image_threshold; changed(); fillGallery(); });
  on("limit", "input", (event) => { state.limit = Number(event.target.value); changed(); });
  on("limit", "change", fillGallery);
  on("slice", "input", drawViewer);
  on("more", "click", () => { state.batch += BATCH; fillGallery(); });
  on("find", "input", markCases);
  on("which", "change", markCases);
  on("order", "change", () => { state.batch = BATCH; fillGallery(); });
  if (byId("order")) byId("order").append(...Object.keys(orders).map((name) => new Option(name)));
  for (const button of document.querySelectorAll("thead button")) button.addEventListener("click", () => sortBy(button));
  for (const button of document.querySelectorAll("#case_table .open")) button.addEventListener("click", () => openViewer(cases[button.closest("tr").dataset.case]));
  if (byId("limit")) {
    const scores = [...cases.map((one) => one.score), ...(record.validation?.scores ?? [])], low = Math.min(...scores), high = Math.max(...scores, low + 1);
    Object.assign(byId("limit"), { min: low, max: high + (high - low) / 50, step: (high - low) / 400, disabled: state.limit === null });
  }
  addEventListener("beforeprint", () => { for (const one of document.querySelectorAll("details")) one.open = true; });
  fillGallery();
  changed();
  Promise.all([drawCharts(), drawGallery()]).then(() => { document.documentElement.dataset.ready = "yes"; });
})();
