// Runs functions of web/ in Node for test_nano_page.py: reads [name, ...arguments] as JSON, writes the result as JSON.
// Arrays of numbers are files of little-endian values: {"file": path, "type": "Uint8ClampedArray"}.

import { readFileSync } from "node:fs";
import { allocatePositions } from "../../web/indices.js";
import { Neo } from "../../web/neo.js";
import { smartResize, toPatches } from "../../web/pixels.js";

const json = (file) => JSON.parse(readFileSync(file, "utf8"));

async function load(folder) {
  const ort = await import("../../web/node_modules/onnxruntime-web/dist/ort.wasm.bundle.min.mjs");
  ort.env.wasm.numThreads = 1;
  return Neo.load(ort, {
    graph: readFileSync(`${folder}/onnx/model.onnx`),
    config: json(`${folder}/config.json`),
    generationConfig: json(`${folder}/generation_config.json`),
    processorConfig: json(`${folder}/processor_config.json`),
    tokenizer: json(`${folder}/tokenizer.json`),
    tokenizerConfig: json(`${folder}/tokenizer_config.json`),
  });
}

const image = ({ file, height, width }) => ({ data: new Uint8ClampedArray(readFileSync(file)), height, width });

const functions = {
  smartResize: (rows) =>
    rows.map((row) => {
      try {
        return smartResize(...row);
      } catch (error) {
        return error.message;
      }
    }),
  patches: (images) =>
    images.map(({ settings, ...rest }) => {
      const { pixels, grid } = toPatches(image(rest), settings);
      return { pixels: [...pixels], grid };
    }),
  positions: (cases, config) => cases.map(({ ids, grids }) => allocatePositions(ids, grids, config)),
  answers: async (folder, questions) => {
    const neo = await load(folder);
    const results = [];
    for (const { question, images } of questions) {
      const inputs = neo.prepare(question, images.map(image));
      const tokens = [];
      for await (const id of neo.generate(inputs, 40)) tokens.push(id);
      const texts = [];
      for await (const text of neo.answer(question, images.map(image))) texts.push(text);
      results.push({ ids: inputs.ids, tokens, texts });
    }
    return results;
  },
};

const [name, ...args] = JSON.parse(readFileSync(0, "utf8"));
console.log(JSON.stringify(await functions[name](...args)));
