// Draws the masks of every answer into its canvas, and shows the class under the pointer or chosen in the legend.
const MASK = 140, FAINT = 30, STRONG = 215; // opacity of a mask, of the others beside a chosen one, and of that one
const FADED = 110; // opacity of the white that covers what is not chosen where there is no mask

async function decoded(url) {
  const image = new Image();
  image.src = url;
  await image.decode();
  const canvas = document.createElement("canvas");
  const size = { width: image.naturalWidth, height: image.naturalHeight };
  Object.assign(canvas, size);
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0);
  const coded = context.getImageData(0, 0, size.width, size.height).data;
  const labels = new Uint16Array(coded.length / 4);
  for (let i = 0; i < labels.length; i++) labels[i] = coded[4 * i] + 256 * coded[4 * i + 1];
  return { labels, ...size };
}

function paint(canvas, chosen) {
  const { labels, colours, width, height } = canvas.masks, context = canvas.getContext("2d");
  const out = context.createImageData(width, height), data = out.data;
  for (let i = 0; i < labels.length; i++) {
    const label = labels[i], colour = colours[label], other = chosen !== null && label !== chosen;
    const border = label !== labels[i + 1] || (i + width < labels.length && label !== labels[i + width]);
    if (colour) {
      data.set(colour, 4 * i);
      data[4 * i + 3] = other ? FAINT : border || chosen !== null ? STRONG : MASK;
    } else if (other) {
      data.fill(255, 4 * i, 4 * i + 3);
      data[4 * i + 3] = FADED;
    }
  }
  context.putImageData(out, 0, 0);
}

function show(answer, chosen, at) {
  const canvas = answer.querySelector("canvas"), tip = answer.querySelector(".tip");
  if (!canvas.masks) return;
  if (canvas.chosen !== chosen) {
    canvas.chosen = chosen;
    paint(canvas, chosen);
    for (const item of answer.querySelectorAll(".legend li"))
      item.classList.toggle("chosen", Number(item.dataset.label) === chosen);
  }
  tip.hidden = at === null || chosen === null;
  if (tip.hidden) return;
  tip.textContent = answer.querySelector(`.legend li[data-label="${chosen}"] b`).textContent;
  tip.style.left = `${at.x}%`;
  tip.style.top = `${at.y}%`;
}

function under(canvas, event) {
  const box = canvas.getBoundingClientRect();
  const x = (event.clientX - box.left) / box.width, y = (event.clientY - box.top) / box.height;
  const column = Math.min(canvas.width - 1, Math.floor(x * canvas.width));
  const row = Math.min(canvas.height - 1, Math.floor(y * canvas.height));
  return { label: canvas.masks.labels[row * canvas.width + column], at: { x: 100 * x, y: 100 * y } };
}

function chooseFrom(event) {
  const answer = event.target.closest(".answer");
  if (!answer) return;
  const item = event.target.closest(".legend li"), canvas = event.target.closest("canvas");
  if (item) return show(answer, Number(item.dataset.label), null);
  if (!canvas || !canvas.masks) return show(answer, null, null);
  const { label, at } = under(canvas, event);
  show(answer, label, at);
}

function leave(event) {
  const answer = event.target.closest && event.target.closest(".answer");
  if (answer && !answer.contains(event.relatedTarget)) show(answer, null, null);
}

// Gradio changes a page's elements in place, so a canvas may get another map, or lose what was drawn.
async function refresh(canvas) {
  const map = canvas.dataset.map;
  if (canvas.dataset.painted === map || canvas.coming === map) return;
  canvas.coming = map;
  const decodedMap = await decoded(map).finally(() => (canvas.coming = null));
  if (canvas.dataset.map !== map) return;
  const bytes = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
  canvas.masks = { ...decodedMap, colours: JSON.parse(canvas.dataset.colours).map((hex) => hex && bytes(hex)) };
  canvas.width = canvas.masks.width;
  canvas.height = canvas.masks.height;
  canvas.chosen = null;
  paint(canvas, null);
  canvas.dataset.painted = map;
}

function start() {
  element.querySelectorAll("canvas[data-map]").forEach(refresh);
}

for (const kind of ["pointermove", "focusin"]) element.addEventListener(kind, chooseFrom);
for (const kind of ["pointerout", "focusout"]) element.addEventListener(kind, leave);
const changes = { childList: true, subtree: true, attributes: true, attributeFilter: ["data-map", "data-painted"] };
new MutationObserver(start).observe(element, changes);
start();
