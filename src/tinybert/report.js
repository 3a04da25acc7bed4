"use strict";
(() => {
  const SVG = "http://www.w3.org/2000/svg";
  const CELL = 14;
  const GUTTER = 74;
  const MOST_LETTERS = 11;
  const data = JSON.parse(document.getElementById("attention-data").textContent);
  const at = (id) => document.getElementById(id);
  const [sentence, layer, head, word] = ["sentence", "layer", "head", "word"].map(at);

  const fill = (select, names, wanted) => {
    select.replaceChildren(...names.map((name, place) => new Option(name, String(place))));
    select.selectedIndex = Math.min(Math.max(wanted, 0), names.length - 1);
  };

  const bytes = new Map();
  const decoded = (row, model) => {
    const name = `${row} ${model}`;
    if (!bytes.has(name)) {
      const text = atob(data.sentences[row][model]);
      bytes.set(name, Uint8Array.from(text, (letter) => letter.charCodeAt(0)));
    }
    return bytes.get(name);
  };

  // Attention as fractions, query by query; head 0 is the mean of all.
  const map = (model) => {
    const pieces = data.sentences[sentence.selectedIndex].pieces.length;
    const size = pieces * pieces;
    const heads = data.layers.map((pair) => pair[model].heads);
    const before = heads.slice(0, layer.selectedIndex).reduce((sum, count) => sum + count, 0);
    const chosen = head.selectedIndex;
    const wanted = chosen ? [chosen - 1] : [...Array(heads[layer.selectedIndex]).keys()];
    const all = decoded(sentence.selectedIndex, model);
    const mean = new Float64Array(size);
    for (const place of wanted) {
      for (let cell = 0; cell < size; cell += 1) {
        mean[cell] += all[(before + place) * size + cell] / 255 / wanted.length;
      }
    }
    return mean;
  };

  const element = (name, attributes, text) => {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const short = (piece) => (piece.length > MOST_LETTERS ? `${piece.slice(0, MOST_LETTERS - 1)}…` : piece);

  const draw = (model, weights, pieces) => {
    const svg = at(`${model}-map`);
    const side = pieces.length * CELL;
    svg.setAttribute("viewBox", `0 0 ${GUTTER + side + 2} ${GUTTER + side + 2}`);
    svg.setAttribute("class", model);
    svg.style.maxWidth = `${1.4 * (GUTTER + side)}px`;
    const parts = [];
    pieces.forEach((piece, place) => {
      const middle = GUTTER + place * CELL + CELL / 2;
      const chosen = place === word.selectedIndex ? "chosen" : "";
      const [x, y] = [GUTTER - 5, middle + 4];
      parts.push(element("text", { x, y, class: chosen, "text-anchor": "end" }, short(piece)));
      const turned = `rotate(-90 ${middle + 4} ${GUTTER - 5})`;
      parts.push(element("text", { x: middle + 4, y: GUTTER - 5, transform: turned }, short(piece)));
    });
    weights.forEach((weight, cell) => {
      const [row, column] = [Math.floor(cell / pieces.length), cell % pieces.length];
      const square = element("rect", {
        class: "cell",
        x: GUTTER + column * CELL,
        y: GUTTER + row * CELL,
        width: CELL - 0.5,
        height: CELL - 0.5,
        "fill-opacity": Math.sqrt(weight).toFixed(3),
      });
      square.append(element("title", {}, `${pieces[row]} → ${pieces[column]}: ${weight.toFixed(2)}`));
      parts.push(square);
    });
    parts.push(element("rect", { class: "around", x: GUTTER, y: GUTTER, width: side, height: side }));
    const y = GUTTER + word.selectedIndex * CELL;
    parts.push(element("rect", { class: "chosen-row", x: GUTTER, y, width: side, height: CELL }));
    svg.replaceChildren(...parts);
  };

  const list = (maps, pieces) => {
    const start = word.selectedIndex * pieces.length;
    const seen = pieces.map((piece, place) => [piece, ...maps.map((weights) => weights[start + place])]);
    seen.sort((one, other) => Math.max(other[1], other[2]) - Math.max(one[1], one[2]));
    const rows = seen.slice(0, 6).map(([piece, ...weights]) => {
      const row = document.createElement("tr");
      const name = document.createElement("th");
      name.scope = "row";
      const isolated = document.createElement("bdi");
      isolated.textContent = piece;
      name.append(isolated);
      row.append(name);
      for (const weight of weights) {
        const cell = document.createElement("td");
        cell.className = "number";
        cell.textContent = weight.toFixed(2);
        row.append(cell);
      }
      return row;
    });
    at("looks").replaceChildren(...rows);
    at("chosen-word").textContent = pieces[word.selectedIndex];
  };

  const show = () => {
    const { pieces } = data.sentences[sentence.selectedIndex];
    const pair = data.layers[layer.selectedIndex];
    const maps = ["teacher", "student"].map(map);
    at("teacher-layer").textContent = pair.teacher.layer;
    at("student-layer").textContent = pair.student.layer;
    ["teacher", "student"].forEach((model, place) => draw(model, maps[place], pieces));
    list(maps, pieces);
    const apart = maps[0].reduce((sum, weight, cell) => sum + Math.abs(weight - maps[1][cell]), 0);
    const share = Math.round((50 * apart) / pieces.length);
    at("attention-said").textContent =
      `Here the student puts ${share} % of a word piece's attention elsewhere than the teacher, on average.`;
  };

  const newLayer = () => {
    const { teacher, student } = data.layers[layer.selectedIndex];
    const count = teacher.heads === student.heads ? student.heads : 0;
    const names = Array.from({ length: count }, (_, place) => `head ${place + 1}`);
    fill(head, ["mean of all heads", ...names], head.selectedIndex);
    show();
  };
  const fillWords = () => {
    const { pieces } = data.sentences[sentence.selectedIndex];
    fill(word, pieces.map((piece, place) => `${place + 1}: ${piece}`), 0);
  };
  const newSentence = () => {
    fillWords();
    show();
  };

  fill(sentence, data.sentences.map(({ text }) => text), 0);
  const names = data.layers.map((pair) => `student ${pair.student.layer}, teacher ${pair.teacher.layer}`);
  fill(layer, names, names.length - 1);
  fillWords();
  newLayer();
  sentence.addEventListener("change", newSentence);
  layer.addEventListener("change", newLayer);
  for (const select of [head, word]) select.addEventListener("change", show);
  at("attention-choice").addEventListener("submit", (event) => event.preventDefault());
})();
