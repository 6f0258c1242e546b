// Frames of a camera, a screen or a file go to the server one at a time: the next is taken when the last one is in the
// cache, so the page never falls behind. Those in between are skipped and counted.
const find = selector => element.querySelector(selector);
const video = find("video");
const chooser = find("input[type=file]");
const canvas = document.createElement("canvas");
let run = 0; // number of the current run; a loop of an earlier one ends
let nextTime = 0; // timestamp of the next frame, in seconds

const say = (text, isNote = false) => {
  const message = find(".message");
  message.textContent = text;
  message.classList.toggle("note", isNote);
};
const settings = {};
for (const input of element.querySelectorAll("input[type=number]")) { // read when complete, not while they are typed
  const name = input.dataset.field;
  settings[name] = input.valueAsNumber;
  input.addEventListener("change", () => {
    const typed = Number.isNaN(input.valueAsNumber) ? settings[name] : input.valueAsNumber;
    input.value = settings[name] = Math.min(Math.max(typed, input.min), input.max);
  });
}
const show = (name, text) => { find(`[data-show="${name}"]`).textContent = text; };
const milliseconds = seconds => `${(1000 * seconds).toFixed(0)} ms`;

function showStatus(status) {
  if (status.tokens === undefined) return;
  show("shown", status.shown);
  show("frames", status.frames);
  show("tokens", status.tokens.toLocaleString("en"));
  show("seconds", status.seconds.toFixed(1));
  show("bytes", `${(status.bytes / 1e6).toFixed(1)} MB`);
}

function showAnswers(questions, answers) {
  const entries = questions.flatMap((question, number) => [["dt", question], ["dd", answers[number] || "…"]]);
  find(".answers").replaceChildren(...entries.map(([tag, text]) => {
    const entry = document.createElement(tag);
    entry.textContent = text;
    return entry;
  }));
}

// The frame that the video shows, its longer side shrunk to `side` pixels. Small ones are sent exactly.
function grab() {
  const scale = Math.min(1, settings.side / Math.max(video.videoWidth, video.videoHeight));
  canvas.width = Math.max(1, Math.round(video.videoWidth * scale));
  canvas.height = Math.max(1, Math.round(video.videoHeight * scale));
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(video, 0, 0, canvas.width, canvas.height);
  return canvas.width * canvas.height <= 2 ** 15 ? canvas.toDataURL("image/png") : canvas.toDataURL("image/jpeg", 0.9);
}

async function loop(current) {
  const recent = [];
  let rate, first, start, slot; // frames are counted from `first` and `start` on, where the rate was last changed
  let skipped = 0, lastSkip = -Infinity;
  show("skipped", 0);
  while (current === run) {
    if (rate !== settings.rate) [rate, first, start, slot] = [settings.rate, performance.now(), nextTime, -1];
    const period = 1 / rate;
    const elapsed = (performance.now() - first) / 1000;
    const due = Math.floor(elapsed / period);
    if (due <= slot) {
      await new Promise(resolve => setTimeout(resolve, 1000 * ((slot + 1) * period - elapsed)));
      continue;
    }
    if (slot >= 0 && due > slot + 1) {
      skipped += due - slot - 1;
      lastSkip = performance.now();
    }
    slot = due;
    const questions = find("textarea").value.split("\n").map(line => line.trim()).filter(Boolean);
    let status;
    try {
      status = await server.show_frame({
        key: neoSession(),
        image: grab(),
        timestamp: start + slot * period,
        max_tokens: settings.budget,
        questions,
      });
    } catch (error) {
      status = { error: `The server does not answer: ${error.message || error}` };
    }
    if (status.error) {
      stop();
      say(status.error);
      return;
    }
    nextTime = status.timestamp + period;
    const now = performance.now();
    recent.push(now);
    while (recent[0] < now - 3000) recent.shift();
    if (recent.length > 1) show("rate", ((recent.length - 1) / (now - recent[0]) * 1000).toFixed(1));
    show("frame", milliseconds(status.frame_seconds));
    if (questions.length) show("answer", milliseconds(status.answer_seconds / questions.length));
    show("skipped", skipped);
    showStatus(status);
    showAnswers(questions, status.answers);
    say(now - lastSkip < 3000 ? "Frames are skipped: the model is slower than this rate." : "", true);
    if (video.ended) stop();
  }
}

async function start(source) {
  stop();
  say("");
  try {
    if (source instanceof File) {
      video.src = URL.createObjectURL(source);
    } else {
      video.srcObject = await source();
      video.srcObject.getTracks().forEach(track => track.addEventListener("ended", stop));
    }
    await video.play();
  } catch (error) {
    stop();
    say(source instanceof File
      ? `${source.name} cannot be played by this browser.`
      : `No video: ${error.message || error}. Cameras need permission, and a page from https or localhost.`);
    return;
  }
  run += 1;
  find("[data-do=stop]").disabled = false;
  loop(run);
}

function stop() {
  run += 1;
  find("[data-do=stop]").disabled = true;
  video.pause();
  if (video.srcObject) video.srcObject.getTracks().forEach(track => track.stop());
  video.srcObject = null;
}

const actions = {
  camera: () => start(() => navigator.mediaDevices.getUserMedia({ video: true })),
  screen: () => start(() => navigator.mediaDevices.getDisplayMedia({ video: true })),
  file: () => chooser.click(),
  stop,
  reset: async () => {
    stop();
    await server.forget(neoSession());
    nextTime = 0;
    showStatus({ shown: 0, frames: 0, tokens: 0, seconds: 0, bytes: 0 });
    showAnswers([], []);
    say("");
  },
};
element.addEventListener("click", event => actions[event.target.dataset?.do]?.());
chooser.addEventListener("change", () => {
  if (chooser.files[0]) start(chooser.files[0]);
  chooser.value = "";
});

// What the stream holds after a reload.
server.get_status(neoSession()).then(status => {
  showStatus(status);
  if (status.timestamp !== undefined && status.timestamp !== null) nextTime = status.timestamp + 1;
});
