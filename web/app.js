// The page: images from a drawing board, files or the camera, a question, and an answer as it is generated.

import * as ort from "onnxruntime-web";
import { Neo } from "./neo.js";

const MAX_SIDE = 512; // pixels; larger images are scaled down before they are resized for the model
const COLORS = {
  red: "rgb(214 39 40)",
  green: "rgb(44 160 44)",
  blue: "rgb(31 80 200)",
  yellow: "rgb(245 210 40)",
  purple: "rgb(150 60 180)",
  orange: "rgb(255 127 14)",
  black: "black",
  white: "white",
};
// In pixels, as in the world that the model knows: the size of shapes, and the grid that they are placed on.
const SHAPE_SIZE = 20;
const SNAP = 4;

// Outlines in a unit square, as the model knows them.
const star = Array.from({ length: 10 }, (_, i) => {
  const [angle, radius] = [(Math.PI * i) / 5, i % 2 ? 0.2 : 0.5];
  return [0.5 + radius * Math.sin(angle), 0.5 - radius * Math.cos(angle)];
});
const circle = Array.from({ length: 48 }, (_, i) => {
  const angle = (Math.PI * i) / 24;
  return [0.5 + 0.5 * Math.sin(angle), 0.5 - 0.5 * Math.cos(angle)];
});
const [low, high] = [1 / 3, 2 / 3];
const [near, far] = [1 / 16, 15 / 16];
const SHAPES = {
  circle,
  square: [[near, near], [far, near], [far, far], [near, far]],
  triangle: [[0.5, 0], [1, 1], [0, 1]],
  star,
  // prettier-ignore
  cross: [[low, 0], [high, 0], [high, low], [1, low], [1, high], [high, high], [high, 1], [low, 1], [low, high], [0, high],
    [0, low], [low, low]],
};
const PEN = [[0.1, 0.9], [0.15, 0.65], [0.75, 0.05], [0.95, 0.25], [0.35, 0.85]];

const find = (id) => document.getElementById(id);
const board = find("board");
const pen = board.getContext("2d", { willReadFrequently: true });
const images = []; // {data, height, width}, RGBA
let neo = null;
let busy = false;
let tool = "circle";
let color = "red";

function say(text, isError = false) {
  find("status").textContent = text;
  find("status").classList.toggle("error", isError);
}

// The question

function suggest() {
  const questions = images.length > 1
    ? ["What changed?", "Describe the picture."]
    : images[0]?.height === 32
      ? ["What number is written?"]
      : ["Describe the picture.", "How many shapes are there?", "What is at the top left?"];
  find("suggestions").replaceChildren(
    ...questions.map((question) => {
      const button = Object.assign(document.createElement("button"), { type: "button", textContent: question });
      button.className = "quiet";
      button.onclick = () => {
        find("question").value = question;
        find("form").requestSubmit();
      };
      return button;
    }),
  );
}

function showImages() {
  find("images").replaceChildren(
    ...images.map((image, number) => {
      const canvas = Object.assign(document.createElement("canvas"), { width: image.width, height: image.height });
      canvas.setAttribute("role", "img");
      canvas.setAttribute("aria-label", `Image ${number + 1}`);
      canvas.getContext("2d").putImageData(new ImageData(image.data, image.width), 0, 0);
      const remove = Object.assign(document.createElement("button"), { type: "button", textContent: "×" });
      remove.setAttribute("aria-label", `Remove image ${number + 1}`);
      remove.onclick = () => {
        images.splice(number, 1);
        showImages();
      };
      const figure = document.createElement("figure");
      figure.append(canvas, remove);
      return figure;
    }),
  );
  suggest();
}

/** Add what can be drawn on a canvas: a bitmap, a video frame or a canvas. */
function addImage(source, width, height) {
  const scale = Math.min(1, MAX_SIDE / Math.max(width, height));
  const [w, h] = [width, height].map((side) => Math.max(1, Math.round(side * scale)));
  const context = new OffscreenCanvas(w, h).getContext("2d");
  context.drawImage(source, 0, 0, w, h);
  images.push(context.getImageData(0, 0, w, h));
  showImages();
}

async function addFiles(files) {
  for (const file of files) {
    try {
      const bitmap = await createImageBitmap(file);
      addImage(bitmap, bitmap.width, bitmap.height);
    } catch {
      say(`${file.name} is not an image that this browser can read.`, true);
    }
  }
}

find("form").onsubmit = async (event) => {
  event.preventDefault();
  const question = find("question").value.trim();
  if (!neo || busy || !question) return;
  busy = find("ask").disabled = true;
  find("answer").textContent = "";
  const start = performance.now();
  let [first, count] = [0, 0];
  try {
    for await (const text of neo.answer(question, images)) {
      first ||= performance.now() - start;
      count += 1;
      find("answer").textContent = text;
      await new Promise((resolve) => setTimeout(resolve)); // lets the browser paint
    }
    const seconds = (performance.now() - start) / 1000;
    say(count ? `First token after ${Math.round(first)} ms, ${count} tokens in ${seconds.toFixed(2)} s.` : "No answer.");
  } catch (error) {
    say(error.message, true);
  }
  busy = find("ask").disabled = false;
};

// The drawing board

function outline(context, points, x, y, size) {
  context.beginPath();
  points.forEach(([px, py]) => context.lineTo(x + px * size, y + py * size));
  context.closePath();
  context.fill();
}

function clearBoard() {
  board.width = board.height = find("digit").checked ? 32 : 64;
  pen.fillStyle = "white";
  pen.fillRect(0, 0, board.width, board.height);
}

function place(event) {
  const box = board.getBoundingClientRect();
  return [event.clientX - box.x, event.clientY - box.y].map((side) => (side / box.width) * board.width);
}

let last = null;
board.onpointerdown = (event) => {
  board.setPointerCapture(event.pointerId);
  const [x, y] = (last = place(event));
  pen.fillStyle = pen.strokeStyle = COLORS[color];
  if (tool in SHAPES) {
    const [left, top] = [x, y].map((center) => SNAP * Math.round((center - SHAPE_SIZE / 2) / SNAP));
    outline(pen, SHAPES[tool], left, top, SHAPE_SIZE);
  } else board.onpointermove(event);
};
board.onpointermove = (event) => {
  if (!last || tool in SHAPES) return;
  pen.lineWidth = color === "white" ? 8 : 3;
  pen.lineCap = "round";
  pen.beginPath();
  pen.moveTo(...last);
  pen.lineTo(...(last = place(event)));
  pen.stroke();
};
board.onpointerup = board.onpointercancel = () => (last = null);

/** A group of buttons of which one is chosen. */
function choices(id, names, draw, choose) {
  const buttons = names.map((name) => {
    const button = Object.assign(document.createElement("button"), { type: "button", title: name });
    button.setAttribute("role", "radio");
    button.setAttribute("aria-label", name);
    draw(button, name);
    button.onclick = () => {
      buttons.forEach((other) => other.setAttribute("aria-checked", other === button));
      choose(name);
    };
    return button;
  });
  find(id).replaceChildren(...buttons);
  return (name) => buttons[names.indexOf(name)].click();
}

const chooseTool = choices(
  "tools",
  [...Object.keys(SHAPES), "pen"],
  (button, name) => {
    const points = (SHAPES[name] ?? PEN).map((point) => point.join()).join(" ");
    button.innerHTML = `<svg viewBox="-0.1 -0.1 1.2 1.2"><polygon points="${points}" fill="currentColor" /></svg>`;
  },
  (name) => (tool = name),
);
const chooseColor = choices(
  "colors",
  Object.keys(COLORS),
  (button, name) => (button.style.background = COLORS[name]),
  (name) => (color = name),
);
find("clear").onclick = clearBoard;
find("digit").onchange = () => {
  clearBoard();
  chooseTool(find("digit").checked ? "pen" : "circle");
  chooseColor(find("digit").checked ? "black" : "red");
};

// Files and the camera

find("file").onchange = async () => {
  await addFiles(find("file").files);
  find("file").value = "";
};
document.ondragover = (event) => {
  event.preventDefault();
  document.body.classList.add("dropping");
};
document.ondragleave = (event) => {
  if (!event.relatedTarget) document.body.classList.remove("dropping");
};
document.ondrop = (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  addFiles(event.dataTransfer.files);
};

function showCamera(isOn) {
  find("camera").hidden = !isOn;
  board.hidden = isOn;
  find("open-camera").textContent = isOn ? "Close camera" : "Camera";
  for (const id of ["clear", "digit"]) find(id).disabled = isOn;
}

find("open-camera").onclick = async () => {
  const video = find("camera");
  if (video.srcObject) {
    video.srcObject.getTracks().forEach((track) => track.stop());
    video.srcObject = null;
    showCamera(false);
    return;
  }
  try {
    video.srcObject = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
    await video.play();
    showCamera(true);
  } catch (error) {
    say(`The camera cannot be used: ${error.message}`, true);
  }
};

find("add").onclick = () => {
  const video = find("camera");
  if (video.hidden) addImage(board, board.width, board.height);
  else addImage(video, video.videoWidth, video.videoHeight);
};

// The model

async function read(file, kind) {
  const response = await fetch(`model/${file}`);
  if (!response.ok) throw new Error(`model/${file} is missing (${response.status}).`);
  return response[kind]();
}

async function load() {
  ort.env.wasm.numThreads = 1; // more need headers that static hosts do not send
  const names = ["config", "generation_config", "processor_config", "tokenizer", "tokenizer_config"];
  const [graph, scene, ...json] = await Promise.all([
    read("onnx/model.onnx", "arrayBuffer"),
    read("scene.png", "blob"),
    ...names.map((name) => read(`${name}.json`, "json")),
  ]);
  const [config, generationConfig, processorConfig, tokenizer, tokenizerConfig] = json;
  const files = { config, generationConfig, processorConfig, tokenizer, tokenizerConfig };
  neo = await Neo.load(ort, { graph: new Uint8Array(graph), ...files });
  await addFiles([scene]);
  find("ask").disabled = false;
  say("Ready.");
}

clearBoard();
chooseTool("circle");
chooseColor("red");
suggest();
load().catch((error) => say(`The model cannot be loaded: ${error.message}`, true));
