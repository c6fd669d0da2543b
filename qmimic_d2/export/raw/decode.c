/*
 * Detections from the outputs of a raw network, in C99 and its standard library. Written by
 * `python -m qmimic_d2 export`; it does what qmimic_d2.export.Decoding does.
 *
 *   #include "decode.c"
 *   int height, width;
 *   resized_size(480, 640, &height, &width);      the size to which a photo of 480 x 640 pixels is resized; put it at
 *                                                 the top left of the input, and fill the rest with the mean
 *   Detection found[MAX_DETECTIONS];
 *   int count = decode(outputs, 480, 640, found); outputs[i] is the tensor OUTPUT_NAMES[i], found is in photo's pixels
 *
 * Detections stand by falling score. decode() has one work space: call it from one thread at a time.
 */
#include <math.h>
#include <stdlib.h>

typedef struct {
    float box[4]; /* x0, y0, x1, y1 */
    float score;
    int class_index;
} Detection;

typedef struct {
    int height, width, num_anchors, max_candidates;
    double stride, offset;
    const float (*anchors)[4];
} Level;

/* CONSTANTS */

typedef struct {
    Detection detection;
    long position; /* in the order of levels, places, anchors and classes */
} Candidate;

static Candidate candidates[MAX_CANDIDATES];

void resized_size(int height, int width, int *resized_height, int *resized_width)
{
    double by_height = (double)INPUT_HEIGHT / height, by_width = (double)INPUT_WIDTH / width;
    double scale = by_height < by_width ? by_height : by_width;
    int new_height = (int)(height * scale + 0.5), new_width = (int)(width * scale + 0.5);
    new_height = new_height < INPUT_HEIGHT ? new_height : INPUT_HEIGHT;
    new_width = new_width < INPUT_WIDTH ? new_width : INPUT_WIDTH;
    *resized_height = new_height > 1 ? new_height : 1;
    *resized_width = new_width > 1 ? new_width : 1;
}

static float sigmoid(float logit)
{
    return 1.0f / (1.0f + expf(-logit));
}

/* Negative if a stands before b: by falling score, then by position. */
static int compare(const void *a, const void *b)
{
    const Candidate *one = a, *other = b;
    if (one->detection.score != other->detection.score)
        return one->detection.score > other->detection.score ? -1 : 1;
    return one->position < other->position ? -1 : 1;
}

/* Keeps the best candidates of a level in a heap, the worst of them on top; returns how many there are. */
static int keep(Candidate *heap, int count, int most, const Candidate *added)
{
    int place = count, child;
    if (count < most) { /* from the end up */
        while (place > 0 && compare(added, &heap[(place - 1) / 2]) > 0) {
            heap[place] = heap[(place - 1) / 2];
            place = (place - 1) / 2;
        }
        heap[place] = *added;
        return count + 1;
    }
    if (compare(added, &heap[0]) > 0)
        return count;
    for (place = 0; (child = 2 * place + 1) < count; place = child) { /* in place of the worst, from the top down */
        if (child + 1 < count && compare(&heap[child + 1], &heap[child]) > 0)
            child++;
        if (compare(added, &heap[child]) > 0)
            break;
        heap[place] = heap[child];
    }
    heap[place] = *added;
    return count;
}

/* The box of an anchor, in pixels of the network's input; delta[k * area] is its k-th number. */
static void decode_box(const float *delta, long area, const float *cell, float x, float y, float *box)
{
    float anchor[4] = {x + cell[0], y + cell[1], x + cell[2], y + cell[3]};
    int axis;
    for (axis = 0; axis < 2; axis++) {
        float size = anchor[axis + 2] - anchor[axis];
        float first = delta[axis * area], second = delta[(axis + 2) * area];
        if (HAS_DISTANCES) {
            float center = 0.5f * (anchor[axis] + anchor[axis + 2]);
            box[axis] = center - (first > 0.0f ? first : 0.0f) * size;
            box[axis + 2] = center + (second > 0.0f ? second : 0.0f) * size;
        } else {
            float center = first / DELTA_WEIGHTS[axis] * size + (anchor[axis] + 0.5f * size);
            float log_scale = second / DELTA_WEIGHTS[axis + 2];
            float length = expf(log_scale < LARGEST_LOG_SCALE ? log_scale : LARGEST_LOG_SCALE) * size;
            box[axis] = center - 0.5f * length;
            box[axis + 2] = center + 0.5f * length;
        }
    }
}

static int decode_level(const Level *level, const float *const *outputs, long position, Candidate *heap)
{
    long area = (long)level->height * level->width, place;
    int anchor, index, count = 0;
    for (place = 0; place < area; place++)
        for (anchor = 0; anchor < level->num_anchors; anchor++)
            for (index = 0; index < NUM_CLASSES; index++, position++) {
                Candidate added;
                float score = sigmoid(outputs[0][(anchor * NUM_CLASSES + index) * area + place]);
                if (HAS_CENTERNESS)
                    score = sqrtf(score * sigmoid(outputs[2][anchor * area + place]));
                if (!(score > SCORE_THRESHOLD))
                    continue;
                added.detection.score = score;
                added.detection.class_index = index;
                added.position = position;
                decode_box(outputs[1] + 4 * anchor * area + place, area, level->anchors[anchor],
                           (float)(level->offset + place % level->width * level->stride),
                           (float)(level->offset + place / level->width * level->stride), added.detection.box);
                count = keep(heap, count, level->max_candidates, &added);
            }
    return count;
}

static float overlap(const float *a, const float *b)
{
    float width = (a[2] < b[2] ? a[2] : b[2]) - (a[0] > b[0] ? a[0] : b[0]);
    float height = (a[3] < b[3] ? a[3] : b[3]) - (a[1] > b[1] ? a[1] : b[1]);
    float inner = (width > 0.0f ? width : 0.0f) * (height > 0.0f ? height : 0.0f);
    return inner / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inner);
}

/* Brings a box into pixels of the photo and clips it; returns whether anything is left. */
static int restore(float *box, const int *size, const int *resized)
{
    int k;
    for (k = 0; k < 4; k++) {
        box[k] *= (float)((double)size[k % 2] / resized[k % 2]);
        box[k] = box[k] > 0.0f ? box[k] : 0.0f;
        box[k] = box[k] < (float)size[k % 2] ? box[k] : (float)size[k % 2];
    }
    return box[2] > box[0] && box[3] > box[1];
}

/*
 * outputs: the network's, in the order of OUTPUT_NAMES. height, width: of the photo, in pixels. found: room for
 * MAX_DETECTIONS. Returns the number of detections; -1 if an output is NaN or infinite.
 */
int decode(const float *const *outputs, int height, int width, Detection *found)
{
    const int per_level = NUM_OUTPUTS / NUM_LEVELS;
    const int channels[3] = {NUM_CLASSES, 4, 1};
    int size[2] = {width, height}, resized[2];
    int i, j, count = 0, kept = 0, left = 0;
    long position = 0, k;
    for (i = 0; i < NUM_LEVELS; i++) {
        long cells = (long)LEVELS[i].height * LEVELS[i].width * LEVELS[i].num_anchors;
        const float *const *own = outputs + i * per_level;
        for (j = 0; j < per_level; j++)
            for (k = 0; k < cells * channels[j]; k++)
                if (!isfinite(own[j][k]))
                    return -1;
        count += decode_level(&LEVELS[i], own, position, candidates + count);
        position += cells * NUM_CLASSES;
    }
    qsort(candidates, (size_t)count, sizeof(Candidate), compare);
    for (i = 0; i < count && kept < MAX_DETECTIONS; i++) {
        const Detection *next = &candidates[i].detection;
        for (j = 0; j < kept; j++)
            if (found[j].class_index == next->class_index && (double)overlap(found[j].box, next->box) > NMS_THRESHOLD)
                break;
        if (j == kept)
            found[kept++] = *next;
    }
    resized_size(height, width, &resized[1], &resized[0]);
    for (i = 0; i < kept; i++)
        if (restore(found[i].box, size, resized))
            found[left++] = found[i];
    return left;
}
