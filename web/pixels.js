// Images to normalised patches, the same numbers as NeoImageProcessor's.

const MAX_ASPECT_RATIO = 200;
const PRECISION = 2 ** 22; // Pillow's fixed-point weights

function roundHalfToEven(x) {
  const floor = Math.floor(x);
  if (x - floor !== 0.5) return Math.round(x);
  return floor % 2 === 0 ? floor : floor + 1;
}

/**
 * The size to which an image is resized: sides are multiples of `factor`, their product within the pixel budget.
 * @returns {[number, number]} height and width in pixels
 */
export function smartResize(height, width, factor, minPixels, maxPixels) {
  if (Math.min(height, width) < 1) {
    throw new RangeError(`An image must have at least 1x1 pixels (height x width), got ${height}x${width}.`);
  }
  if (Math.max(height, width) / Math.min(height, width) > MAX_ASPECT_RATIO) {
    throw new RangeError(
      `The sides of an image may differ by a factor of ${MAX_ASPECT_RATIO} at most, got ${height}x${width} pixels.`,
    );
  }
  const fit = (scale, round) => [height, width].map((side) => round(side, scale) * factor);
  const rounded = fit(1, (side) => Math.max(1, roundHalfToEven(side / factor)));
  const area = rounded[0] * rounded[1];
  if (area > maxPixels) {
    const beta = Math.sqrt((height * width) / maxPixels);
    return fit(beta, (side) => Math.max(1, Math.floor(side / beta / factor)));
  }
  if (area < minPixels) {
    const beta = Math.sqrt(minPixels / (height * width));
    return fit(beta, (side) => Math.ceil((side * beta) / factor));
  }
  return rounded;
}

function bicubic(x) {
  const a = -0.5;
  x = Math.abs(x);
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  if (x < 2) return (((x - 5) * x + 8) * x - 4) * a;
  return 0;
}

/** For each of `to` outputs: its first input and the fixed-point weights of the inputs from there on. */
function bicubicWeights(from, to) {
  const scale = from / to;
  const stretch = Math.max(scale, 1); // a smaller image averages over more pixels
  const support = 2 * stretch;
  return Array.from({ length: to }, (_, i) => {
    const center = (i + 0.5) * scale;
    const first = Math.max(0, Math.trunc(center - support + 0.5));
    const end = Math.min(from, Math.trunc(center + support + 0.5));
    const weights = [];
    let sum = 0;
    for (let j = first; j < end; j++) {
      const weight = bicubic((j - center + 0.5) * (1 / stretch));
      weights.push(weight);
      sum += weight;
    }
    const inverse = 1 / sum;
    return { first, weights: weights.map((x) => Math.trunc(x * inverse * PRECISION + (x * inverse < 0 ? -0.5 : 0.5))) };
  });
}

/** Resize one axis of uint8 pixels: `lines` rows of `from` entries, `stride` apart, of which each holds `depth` values. */
function resizeAxis(pixels, { outer, from, to, inner }) {
  if (from === to) return pixels;
  const result = new Uint8ClampedArray(outer * to * inner);
  bicubicWeights(from, to).forEach(({ first, weights }, i) => {
    for (let o = 0; o < outer; o++) {
      for (let k = 0; k < inner; k++) {
        let sum = PRECISION / 2;
        for (let j = 0; j < weights.length; j++) sum += pixels[(o * from + first + j) * inner + k] * weights[j];
        result[(o * to + i) * inner + k] = Math.floor(sum / PRECISION);
      }
    }
  });
  return result;
}

/** Resize uint8 pixels (height, width, 3) as Pillow does with BICUBIC, bit for bit. */
export function resize(pixels, height, width, newHeight, newWidth) {
  const wide = resizeAxis(pixels, { outer: height, from: width, to: newWidth, inner: 3 });
  return resizeAxis(wide, { outer: 1, from: height, to: newHeight, inner: newWidth * 3 });
}

/**
 * RGBA to RGB as in training: an image with some but not all pixels fully transparent is composited on white, in any
 * other the alpha channel is dropped.
 */
export function toRgb(rgba) {
  const count = rgba.length / 4;
  let transparent = 0;
  for (let i = 0; i < count; i++) transparent += rgba[4 * i + 3] === 0;
  const composite = transparent > 0 && transparent < count;
  const rgb = new Uint8ClampedArray(count * 3);
  for (let i = 0; i < count; i++) {
    const alpha = rgba[4 * i + 3];
    for (let c = 0; c < 3; c++) {
      const value = rgba[4 * i + c];
      const sum = value * alpha + 255 * (255 - alpha) + 128;
      rgb[3 * i + c] = composite ? ((sum >> 8) + sum) >> 8 : value;
    }
  }
  return rgb;
}

/**
 * Patches of an image, row by row, each channel by channel.
 * @param {{data: Uint8ClampedArray, height: number, width: number}} image RGBA, as from a canvas
 * @param settings the `image_processor` of processor_config.json
 * @returns {{pixels: Float32Array, grid: [number, number]}} (patches, 3 * patch_size^2), and rows and columns
 */
export function toPatches({ data, height, width }, settings) {
  const { patch_size: side, spatial_merge_size: merge, image_mean: mean, image_std: std } = settings;
  const [newHeight, newWidth] = smartResize(height, width, side * merge, settings.min_pixels, settings.max_pixels);
  const resized = resize(toRgb(data), height, width, newHeight, newWidth);
  const f32 = Math.fround; // every step in float32
  const table = mean.map((m, c) =>
    Float32Array.from({ length: 256 }, (_, x) => f32(f32(f32(x / 255) - f32(m)) / f32(std[c]))),
  );
  const [rows, columns] = [newHeight / side, newWidth / side];
  const pixels = new Float32Array(rows * columns * 3 * side * side);
  let place = 0;
  for (let row = 0; row < rows; row++) {
    for (let column = 0; column < columns; column++) {
      for (let c = 0; c < 3; c++) {
        for (let y = row * side; y < (row + 1) * side; y++) {
          for (let x = column * side; x < (column + 1) * side; x++) {
            pixels[place++] = table[c][resized[(y * newWidth + x) * 3 + c]];
          }
        }
      }
    }
  }
  return { pixels, grid: [rows, columns] };
}
