// Reads memory as fast as a core can: eight streams side by side, because a processor reads ahead of each within a page only.
#include <stdint.h>

uint64_t read_streams(const uint64_t *data, long words) {
    enum { STREAMS = 8, STEP = 32 };  // words: four lines of a stream in turn
    const long each = words / STREAMS / STEP * STEP;
    uint64_t sums[STEP] = {0};
    for (long i = 0; i < each; i += STEP)
        for (int s = 0; s < STREAMS; ++s)
            for (int j = 0; j < STEP; ++j) sums[j] += data[s * each + i + j];
    uint64_t total = 0;
    for (int j = 0; j < STEP; ++j) total += sums[j];
    return total;
}
