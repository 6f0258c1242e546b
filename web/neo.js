// NEO on onnxruntime-web: one graph for prefill and decoding, written by `neo-hf onnx`.

import { allocatePositions } from "./indices.js";
import { toPatches } from "./pixels.js";
import { Prompter } from "./prompt.js";

export class Neo {
  /**
   * @param ort onnxruntime-web
   * @param files {graph: Uint8Array, and the parsed JSON files config, generationConfig, processorConfig, tokenizer and
   *   tokenizerConfig}
   */
  static async load(ort, files) {
    const neo = new Neo();
    neo.ort = ort;
    neo.config = files.config;
    neo.settings = files.processorConfig.image_processor;
    neo.eos = [files.generationConfig.eos_token_id].flat();
    neo.prompter = new Prompter(files.tokenizer, files.tokenizerConfig);
    neo.session = await ort.InferenceSession.create(files.graph, { executionProviders: ["wasm"] });
    return neo;
  }

  /**
   * Answer a question about images greedily.
   * @param {string} question
   * @param {{data: Uint8ClampedArray, height: number, width: number}[]} images RGBA, as from a canvas
   * @yields {string} the answer so far
   */
  async *answer(question, images, { maxNewTokens = 64 } = {}) {
    const answer = [];
    for await (const id of this.generate(this.prepare(question, images), maxNewTokens)) {
      answer.push(id);
      yield this.prompter.decode(answer);
    }
  }

  /** Token ids, patches and grids of a question. */
  prepare(question, images) {
    const patches = images.map((image) => toPatches(image, this.settings));
    const grids = patches.map(({ grid }) => grid);
    const merge = this.settings.spatial_merge_size;
    const ids = this.prompter.ask(question, grids.map(([rows, columns]) => (rows * columns) / merge ** 2));
    const pixels = new Float32Array(patches.reduce((sum, patch) => sum + patch.pixels.length, 0));
    patches.reduce((place, patch) => (pixels.set(patch.pixels, place), place + patch.pixels.length), 0);
    return { ids, pixels, grids };
  }

  /** Token ids of the answer, one by one, without the one that ends it. */
  async *generate({ ids, pixels, grids }, maxNewTokens) {
    let { positions, next } = allocatePositions(ids, grids, this.config);
    let cache = this.emptyCache();
    let total = ids.length;
    for (let step = 0; step < maxNewTokens; step++) {
      const { logits, ...present } = await this.session.run({
        input_ids: this.integers(ids, [1, ids.length]),
        attention_mask: this.integers(Array(total).fill(1), [1, total]),
        position_ids: this.integers(positions.flat(), [3, 1, ids.length]),
        pixel_values: new this.ort.Tensor("float32", pixels, [pixels.length / this.patchWidth, this.patchWidth]),
        image_grid_hw: this.integers(grids.flat(), [grids.length, 2]),
        logits_to_keep: this.integers([-1], [1]),
        ...cache,
      });
      const id = logits.data.reduce((best, x, i, all) => (x > all[best] ? i : best), 0);
      if (this.eos.includes(id)) return;
      yield id;
      cache = Object.fromEntries(
        Object.entries(present).map(([name, tensor]) => [name.replace("present", "past_key_values"), tensor]),
      );
      [ids, positions, pixels, grids] = [[id], [[next++], [0], [0]], new Float32Array(0), []];
      total += 1;
    }
  }

  get patchWidth() {
    const { num_channels: channels, patch_size: side } = this.config.vision_config;
    return channels * side ** 2;
  }

  emptyCache() {
    const { num_hidden_layers: layers, num_key_value_heads: heads, head_dim: width } = this.config.text_config;
    const empty = (size) => new this.ort.Tensor("float32", new Float32Array(0), [1, heads, 0, size]);
    return Object.fromEntries(
      Array.from({ length: layers }, (_, layer) => [
        [`past_key_values.${layer}.key`, empty(2 * width)],
        [`past_key_values.${layer}.value`, empty(width)],
      ]).flat(),
    );
  }

  integers(values, shape) {
    return new this.ort.Tensor("int64", BigInt64Array.from(values, BigInt), shape);
  }
}
