/*
 * Detections from the outputs of a raw network, in JavaScript without packages. Written by
 * `python -m qmimic_d2 export`; it does what qmimic_d2.export.Decoding does.
 *
 *   import { MODEL, decode, resizedSize } from "./decode.mjs";
 *   const [height, width] = resizedSize(480, 640);  // the size to which a photo of 480 x 640 pixels is resized; put it
 *                                                   // at the top left of the input, and fill the rest with the mean
 *   for (const { box, score, classIndex } of decode(outputs, 480, 640))  // box: x0, y0, x1, y1 in the photo's pixels
 *     console.log(MODEL.classes[classIndex].name, score, box);
 *
 * outputs holds a Float32Array for every name in MODEL.outputs. Detections stand by falling score.
 */

/* CONSTANTS */

const f32 = Math.fround;

export function resizedSize(height, width) {
  const { fixed_height: inputHeight, fixed_width: inputWidth } = MODEL.preprocessing;
  const scale = Math.min(inputHeight / height, inputWidth / width);
  const fit = (length, most) => Math.max(Math.min(Math.floor(length * scale + 0.5), most), 1);
  return [fit(height, inputHeight), fit(width, inputWidth)];
}

const sigmoid = (logit) => f32(1 / f32(1 + f32(Math.exp(-logit))));

const byScore = (one, other) => other.score - one.score || one.position - other.position;

// delta(k) is the k-th number of the box; anchor and the result are x0, y0, x1, y1 in pixels of the network's input.
function decodeBox(delta, anchor) {
  const { box_coding, delta_weights, largest_log_scale } = MODEL.decoding;
  const box = [0, 0, 0, 0];
  for (const axis of [0, 1]) {
    const size = f32(anchor[axis + 2] - anchor[axis]);
    let center, before, after;
    if (box_coding === "distances") {
      center = f32(0.5 * f32(anchor[axis] + anchor[axis + 2]));
      [before, after] = [axis, axis + 2].map((k) => f32(Math.max(delta(k), 0) * size));
    } else {
      const shift = f32(f32(delta(axis) / f32(delta_weights[axis])) * size);
      center = f32(shift + f32(anchor[axis] + f32(0.5 * size)));
      const logScale = Math.min(f32(delta(axis + 2) / f32(delta_weights[axis + 2])), f32(largest_log_scale));
      before = after = f32(0.5 * f32(f32(Math.exp(logScale)) * size));
    }
    box[axis] = f32(center - before);
    box[axis + 2] = f32(center + after);
  }
  return box;
}

function decodeLevel(level, [logits, deltas, centerness], position) {
  const { num_classes, score_threshold, top_k } = MODEL.decoding;
  const area = level.height * level.width;
  const found = [];
  for (let place = 0; place < area; place++) {
    for (let anchor = 0; anchor < level.anchors.length; anchor++) {
      for (let classIndex = 0; classIndex < num_classes; classIndex++, position++) {
        let score = sigmoid(logits[(anchor * num_classes + classIndex) * area + place]);
        if (centerness) score = f32(Math.sqrt(f32(score * sigmoid(centerness[anchor * area + place]))));
        if (score > f32(score_threshold)) found.push({ score, classIndex, position, anchor, place });
      }
    }
  }
  return found.sort(byScore).slice(0, top_k).map(({ score, classIndex, position, anchor, place }) => {
    const x = f32(level.offset + (place % level.width) * level.stride);
    const y = f32(level.offset + Math.floor(place / level.width) * level.stride);
    const box = level.anchors[anchor].map((each, k) => f32((k % 2 ? y : x) + each));
    return { box: decodeBox((k) => deltas[(4 * anchor + k) * area + place], box), score, classIndex, position };
  });
}

function overlap(a, b) {
  const width = Math.max(f32(Math.min(a[2], b[2]) - Math.max(a[0], b[0])), 0);
  const height = Math.max(f32(Math.min(a[3], b[3]) - Math.max(a[1], b[1])), 0);
  const inner = f32(width * height);
  const [one, other] = [a, b].map((box) => f32(f32(box[2] - box[0]) * f32(box[3] - box[1])));
  return f32(inner / f32(f32(one + other) - inner));
}

// outputs: Float32Array by name. height, width: of the photo, in pixels. Throws an Error if an output is not finite.
export function decode(outputs, height, width) {
  const { decoding } = MODEL;
  const kinds = ["logits", "deltas", ...(decoding.has_centerness ? ["centerness"] : [])];
  let position = 0;
  const candidates = decoding.levels.flatMap((level) => {
    const own = kinds.map((kind) => outputs[`${kind}_${level.name}`]);
    if (!own.every((each) => each.every(Number.isFinite))) throw new Error("the network's outputs are NaN or infinite");
    const found = decodeLevel(level, own, position);
    position += level.height * level.width * level.anchors.length * decoding.num_classes;
    return found;
  });
  const kept = [];
  for (const next of candidates.sort(byScore)) {
    if (kept.length === decoding.max_detections) break;
    const isCovered = ({ classIndex, box }) =>
      classIndex === next.classIndex && overlap(box, next.box) > decoding.nms_threshold;
    if (!kept.some(isCovered)) kept.push(next);
  }
  const [resizedHeight, resizedWidth] = resizedSize(height, width);
  return kept
    .map(({ box, score, classIndex }) => ({
      box: box.map((each, k) => {
        const [length, resized] = k % 2 ? [height, resizedHeight] : [width, resizedWidth];
        return Math.min(Math.max(f32(each * f32(length / resized)), 0), length);
      }),
      score,
      classIndex,
    }))
    .filter(({ box }) => box[2] > box[0] && box[3] > box[1]);
}
