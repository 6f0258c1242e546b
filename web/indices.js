// NEO's three-dimensional token indices (paper, section 3.1), the same numbers as indexing_neo.py's. The graph derives
// the mask from them.

/**
 * T, H and W index of each token of one row. T counts tokens, a whole image as one; H and W are the row and column of a
 * visual token in its image, and 0 for all other tokens.
 * @param {number[]} ids
 * @param {[number, number][]} grids rows and columns of each image in patches
 * @param config config.json
 * @returns {{positions: number[][], next: number}} T, H and W, and the T index that follows
 */
export function allocatePositions(ids, grids, config) {
  const merge = config.vision_config.spatial_merge_size;
  const cells = grids.flatMap(([rows, columns]) =>
    Array.from({ length: (rows / merge) * (columns / merge) }, (_, i) => {
      const width = columns / merge;
      return [Math.floor(i / width), i % width];
    }),
  );
  const found = ids.filter((id) => id === config.image_token_id).length;
  if (found !== cells.length) {
    throw new RangeError(`The input holds ${found} image tokens, but the images give ${cells.length}.`);
  }
  const positions = [[], [], []];
  let t = -1;
  let rank = 0;
  ids.forEach((id, i) => {
    const isImage = id === config.image_token_id;
    t += !isImage + (ids[i - 1] === config.image_start_token_id);
    const [row, column] = isImage ? cells[rank++] : [0, 0];
    [t, row, column].forEach((index, axis) => positions[axis].push(index));
  });
  return { positions, next: t + 1 + (ids.at(-1) === config.image_start_token_id) };
}
