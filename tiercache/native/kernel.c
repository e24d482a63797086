/* Copies that hash what they move: every 64 bytes are read once, into a register that is both hashed and written.
 *
 * The digest is XXH3-64 with seed 0 (xxHash's specification, doc/xxhash_spec.md, "XXH3 Algorithm Overview"), the long
 * form for inputs above 240 bytes; shorter ones are the caller's. Writes go past the processor's caches where they are
 * aligned and the caller says so, which saves reading what is overwritten: half of the traffic to memory again.
 *
 * Nothing here knows Python, allocates, blocks or fails. The caller (tiercache/native) has checked every address.
 */
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define STRIPE 64
#define BLOCK_STRIPES 16
#define SECRET_BYTES 192
#define AHEAD 1024 /* bytes that are asked for before their turn: hardware stops at the end of each page of 4 KiB */
#define prefetch(address) __builtin_prefetch((address), 0, 2)

#define PRIME32_1 0x9E3779B1u
#define PRIME32_2 0x85EBCA77u
#define PRIME32_3 0xC2B2AE3Du
#define PRIME64_1 0x9E3779B185EBCA87u
#define PRIME64_2 0xC2B2AE3D27D4EB4Fu
#define PRIME64_3 0x165667B19E3779F9u
#define PRIME64_4 0x85EBCA77C2B2AE63u
#define PRIME64_5 0x27D4EB2F165667C5u

/* The specification's default secret. */
static const uint8_t SECRET[SECRET_BYTES] __attribute__((aligned(64))) = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};

typedef struct {
    uint64_t acc[8] __attribute__((aligned(64)));
    int64_t left; /* stripes before the last one */
    int64_t at;   /* stripe within a block of 16 */
} State;

static inline uint64_t read64(const uint8_t *at)
{
    uint64_t value;
    memcpy(&value, at, 8);
    return value;
}

/* ------------------------------------------------------------------------------------------- sets of instructions */

#if defined(__x86_64__)

#define NAME(name) name##_256
#define TARGET __attribute__((target("avx2")))
typedef struct {
    __m256i a, b;
} Vec_256;
TARGET static inline Vec_256 load_256(const uint8_t *at)
{
    return (Vec_256){_mm256_loadu_si256((const void *)at), _mm256_loadu_si256((const void *)(at + 32))};
}
TARGET static inline void store_256(uint8_t *at, Vec_256 value)
{
    _mm256_storeu_si256((void *)at, value.a);
    _mm256_storeu_si256((void *)(at + 32), value.b);
}
TARGET static inline void stream_256(uint8_t *at, Vec_256 value)
{
    _mm256_stream_si256((void *)at, value.a);
    _mm256_stream_si256((void *)(at + 32), value.b);
}
TARGET static inline __m256i mix_half(__m256i acc, __m256i data, const uint8_t *secret)
{
    __m256i key = _mm256_xor_si256(data, _mm256_loadu_si256((const void *)secret));
    __m256i product = _mm256_mul_epu32(key, _mm256_srli_epi64(key, 32));
    return _mm256_add_epi64(acc, _mm256_add_epi64(product, _mm256_shuffle_epi32(data, 0x4E)));
}
TARGET static inline Vec_256 mix_256(Vec_256 acc, Vec_256 data, const uint8_t *secret)
{
    return (Vec_256){mix_half(acc.a, data.a, secret), mix_half(acc.b, data.b, secret + 32)};
}
TARGET static inline __m256i scramble_half(__m256i acc, const uint8_t *secret)
{
    __m256i prime = _mm256_set1_epi32((int)PRIME32_1);
    __m256i mixed = _mm256_xor_si256(acc, _mm256_srli_epi64(acc, 47));
    mixed = _mm256_xor_si256(mixed, _mm256_loadu_si256((const void *)secret));
    __m256i high = _mm256_mul_epu32(_mm256_srli_epi64(mixed, 32), prime);
    return _mm256_add_epi64(_mm256_mul_epu32(mixed, prime), _mm256_slli_epi64(high, 32));
}
TARGET static inline Vec_256 scramble_256(Vec_256 acc)
{
    const uint8_t *secret = SECRET + SECRET_BYTES - STRIPE;
    return (Vec_256){scramble_half(acc.a, secret), scramble_half(acc.b, secret + 32)};
}
#include "body.h"
#undef NAME
#undef TARGET

#endif

#define NAME(name) name##_64
#define TARGET
typedef struct {
    uint64_t lane[8];
} Vec_64;
static inline Vec_64 load_64(const uint8_t *at)
{
    Vec_64 value;
    memcpy(&value, at, STRIPE);
    return value;
}
static inline void store_64(uint8_t *at, Vec_64 value) { memcpy(at, &value, STRIPE); }
static inline void stream_64(uint8_t *at, Vec_64 value) { memcpy(at, &value, STRIPE); }
static inline Vec_64 mix_64(Vec_64 acc, Vec_64 data, const uint8_t *secret)
{
    for (int i = 0; i < 8; i++) {
        uint64_t key = data.lane[i] ^ read64(secret + 8 * i);
        acc.lane[i] += (key & 0xFFFFFFFFu) * (key >> 32) + data.lane[i ^ 1];
    }
    return acc;
}
static inline Vec_64 scramble_64(Vec_64 acc)
{
    for (int i = 0; i < 8; i++) {
        uint64_t mixed = acc.lane[i] ^ (acc.lane[i] >> 47) ^ read64(SECRET + SECRET_BYTES - STRIPE + 8 * i);
        acc.lane[i] = mixed * PRIME32_1;
    }
    return acc;
}
#include "body.h"
#undef NAME
#undef TARGET

typedef void Stripes(State *, const uint8_t *, uint8_t *, int64_t, int64_t, int, int);
static Stripes *stripes = stripes_64;

#ifndef SOURCE
#define SOURCE ""
#endif
/* Of what it was built: the caller packs structures by hand, and has to know that they are these. */
const char tiercache_source[] = SOURCE;

/* Chooses the widest instructions that this processor has, at most `bits` (0: no limit); answers their width. Wider ones
 * than 256 bits hash no faster than memory is, and copy slower where addresses are no multiples of 64. */
int64_t tiercache_choose(int64_t bits)
{
    stripes = stripes_64;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if ((!bits || bits >= 256) && __builtin_cpu_supports("avx2")) {
        stripes = stripes_256;
        return 256;
    }
#endif
    return 64;
}

/* ------------------------------------------------------------------------------------------------------ the digest */

static void begin(State *state, int64_t bytes)
{
    const uint64_t first[8] = {PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3, PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1};
    memcpy(state->acc, first, sizeof first);
    state->left = (bytes - 1) / STRIPE;
    state->at = 0;
}

static uint64_t end(const State *state, int64_t bytes)
{
    uint64_t sum = (uint64_t)bytes * PRIME64_1;
    for (int i = 0; i < 4; i++) {
        const uint8_t *secret = SECRET + 11 + 16 * i;
        uint64_t one = state->acc[2 * i] ^ read64(secret), other = state->acc[2 * i + 1] ^ read64(secret + 8);
        unsigned __int128 product = (unsigned __int128)one * other;
        sum += (uint64_t)product ^ (uint64_t)(product >> 64);
    }
    sum ^= sum >> 37;
    sum *= 0x165667919E3779F9u;
    return sum ^ (sum >> 32);
}

static int aligned(const void *at) { return !((uintptr_t)at % STRIPE); }

static void finish(void)
{
#if defined(__x86_64__)
    _mm_sfence(); /* streamed writes are seen by others no later than whatever this thread writes next */
#endif
}

/* ------------------------------------------------------------------------------------------- whole spans, by parts */

/* Copies `bytes`, more than 240, or only hashes them where `to` is NULL; answers their digest. */
static uint64_t copy_part(const uint8_t *from, uint8_t *to, int64_t bytes)
{
    State state;
    begin(&state, bytes);
    int64_t whole = (bytes - 1) / STRIPE, rest = bytes - whole * STRIPE;
    stripes(&state, from, to, whole, AHEAD, 1, 0);
    /* The last stripe of the hash is the last 64 bytes, of which some were in the one before, too. Those are read twice:
     * whoever changes them meanwhile gets a digest that fits neither. */
    uint8_t last[2 * STRIPE];
    memcpy(last, from + (whole - 1) * STRIPE, STRIPE + rest);
    if (to)
        memcpy(to + whole * STRIPE, last + STRIPE, rest);
    stripes(&state, last + rest, NULL, 1, 0, 1, 0);
    return end(&state, bytes);
}

typedef struct {
    const uint8_t *from;
    uint8_t *to; /* NULL: it is only hashed */
    int64_t bytes, part_bytes;
} Span;

/* Copies (or hashes) spans in parts; `digests` takes one a part. Nothing is streamed: whoever asked reads it next. */
void tiercache_spans(const Span *span, int64_t spans, uint64_t *digests)
{
    for (; spans--; span++)
        for (int64_t at = 0; at < span->bytes; at += span->part_bytes) {
            int64_t some = span->bytes - at < span->part_bytes ? span->bytes - at : span->part_bytes;
            *digests++ = copy_part(span->from + at, span->to ? span->to + at : NULL, some);
        }
}

/* ----------------------------------------------------------------------------- blocks of KV, strided at one of both */

typedef struct {
    int64_t first, count; /* units */
    int64_t start, bytes; /* in a stored block */
    int64_t slot;         /* where its digest goes */
} Part;

typedef struct { /* K or V of one layer and head: rows that follow one another where they are stored */
    int64_t engine; /* address of row 0 at position 0; 0: not in this engine's memory, only hashed */
    int64_t row_stride;
    int64_t row_bytes; /* a multiple of 64 */
    int64_t kind;      /* which position counts */
    int64_t apart;     /* bytes from element to element of a row, where they do not lie together in the engine; or 0 */
    int64_t element;   /* bytes of one, then: 1, 2, 4 or 8 */
} Unit;

typedef struct {
    int64_t mode, hashed, parts, rows, kinds, slots;
    const Part *part;
    const Unit *unit; /* and one more after the last, to look ahead */
} Program;

enum { GATHER, SCATTER, DIGEST };

#define STAGE 16384 /* a row is no longer than this, where its elements lie apart */

#define TRANSPOSE(type)                                                                              \
    for (int64_t i = 0; i < unit->row_bytes / (int64_t)sizeof(type); i++)                            \
        for (int64_t row = 0; row < rows; row++) {                                                   \
            uint8_t *there = engine + i * unit->apart + row * unit->row_stride;                      \
            uint8_t *here = stage + row * unit->row_bytes + i * sizeof(type);                        \
            out ? memcpy(there, here, sizeof(type)) : memcpy(here, there, sizeof(type));             \
        }

#if defined(__x86_64__)
/* Transposes 8 x 8 elements of two bytes. */
static inline void transpose_8x8(const uint8_t *from, int64_t from_step, uint8_t *to, int64_t to_step)
{
    __m128i a[8], b[8];
    for (int i = 0; i < 8; i++)
        a[i] = _mm_loadu_si128((const void *)(from + i * from_step));
    for (int i = 0; i < 4; i++) {
        b[2 * i] = _mm_unpacklo_epi16(a[i], a[i + 4]);
        b[2 * i + 1] = _mm_unpackhi_epi16(a[i], a[i + 4]);
    }
    for (int i = 0; i < 4; i++) {
        a[2 * i] = _mm_unpacklo_epi16(b[i], b[i + 4]);
        a[2 * i + 1] = _mm_unpackhi_epi16(b[i], b[i + 4]);
    }
    for (int i = 0; i < 4; i++) {
        _mm_storeu_si128((void *)(to + 2 * i * to_step), _mm_unpacklo_epi16(a[i], a[i + 4]));
        _mm_storeu_si128((void *)(to + (2 * i + 1) * to_step), _mm_unpackhi_epi16(a[i], a[i + 4]));
    }
}
#endif

/* Moves rows between the stage and an engine that keeps their elements apart. */
static void transpose(const Unit *unit, uint8_t *stage, uint8_t *engine, int64_t rows, int out)
{
#if defined(__x86_64__)
    if (unit->element == 2 && unit->row_stride == 2 && rows % 8 == 0) { /* rows of 64 bytes have 32 elements */
        for (int64_t i = 0; i < unit->row_bytes / 2; i += 8)
            for (int64_t row = 0; row < rows; row += 8) {
                uint8_t *there = engine + i * unit->apart + row * 2, *here = stage + row * unit->row_bytes + i * 2;
                if (out)
                    transpose_8x8(here, unit->row_bytes, there, unit->apart);
                else
                    transpose_8x8(there, unit->apart, here, unit->row_bytes);
            }
        return;
    }
#endif
    if (unit->element == 1)
        TRANSPOSE(uint8_t)
    else if (unit->element == 2)
        TRANSPOSE(uint16_t)
    else if (unit->element == 4)
        TRANSPOSE(uint32_t)
    else
        TRANSPOSE(uint64_t)
}

static void move_apart(
    const Program *program, State *state, const Unit *unit, uint8_t *stored, uint8_t *engine, int64_t rows)
{
    uint8_t stage[STAGE] __attribute__((aligned(64)));
    int64_t most = STAGE / unit->row_bytes;
    for (int64_t some; rows; rows -= some, engine += some * unit->row_stride) {
        some = rows < most ? rows : most;
        int64_t bytes = some * unit->row_bytes, count = bytes / STRIPE;
        if (program->mode == SCATTER) {
            stripes(state, stored, stage, count, AHEAD, (int)program->hashed, 0);
            transpose(unit, stage, engine, some, 1);
        } else {
            transpose(unit, stage, engine, some, 0);
            uint8_t *to = program->mode == DIGEST ? NULL : stored;
            stripes(state, stage, to, count, 0, (int)program->hashed, to && aligned(to));
        }
        stored += program->mode == DIGEST ? 0 : bytes;
    }
}

/* Moves some rows that follow one another where they are stored. */
static void move(const Program *program, State *state, const Unit *unit, uint8_t *stored, uint8_t *engine, int64_t rows)
{
    if (unit->apart) {
        move_apart(program, state, unit, stored, engine, rows);
        return;
    }
    int64_t stripes_of_row = unit->row_bytes / STRIPE, times = rows;
    if (unit->row_stride == unit->row_bytes) {
        stripes_of_row *= rows;
        times = 1;
    }
    /* Rows that lie apart follow no pattern that hardware sees: those of the next unit are asked for one by one. */
    int64_t ahead = times == 1 || program->mode == SCATTER ? AHEAD : unit[1].engine - unit->engine;
    for (int64_t row = 0; row < times; row++, engine += unit->row_stride) {
        uint8_t *from = program->mode == SCATTER ? stored : engine;
        uint8_t *to = program->mode == SCATTER ? engine : stored;
        if (program->mode == DIGEST)
            to = NULL;
        else
            stored += stripes_of_row * STRIPE;
        stripes(state, from, to, stripes_of_row, ahead, (int)program->hashed, to && aligned(to));
    }
}

/* Rows [first, stop) of a stored unit have no place in the engine: of a scatter they count in the digest all the same. */
static void skip(const Program *program, State *state, const Unit *unit, uint8_t *stored, int64_t first, int64_t stop)
{
    if (first < stop && program->hashed && program->mode == SCATTER)
        stripes(state, stored + first * unit->row_bytes, NULL, (stop - first) * unit->row_bytes / STRIPE, AHEAD, 1, 0);
}

/* One unit of one block: rows that have a place in the engine are moved, the others skipped. */
static void move_unit(
    const Program *program, State *state, const Unit *unit, uint8_t *stored, const int64_t *run, int64_t runs)
{
    int64_t done = 0, width = 2 + program->kinds;
    for (int64_t i = 0; i < runs && unit->engine; i++, run += width) {
        int64_t first = run[0], rows = run[1];
        skip(program, state, unit, stored, done, first);
        uint8_t *engine = (uint8_t *)(unit->engine + run[2 + unit->kind]);
        move(program, state, unit, stored ? stored + first * unit->row_bytes : NULL, engine, rows);
        done = first + rows;
    }
    skip(program, state, unit, stored, done, program->rows);
}

/* Blocks [0, blocks): `stored` are their addresses (of a DIGEST: none), the runs of block b are starts[b] to starts[b + 1],
 * each (first row, rows, offset of the first row by kind). A SCATTER compares digests with those in `digests` and sets
 * `good`; the others write them there. A block that has a wrong part is left as it is then. */
void tiercache_blocks(
    const Program *program, int64_t blocks, uint8_t *const *stored, const int64_t *starts, const int64_t *runs,
    uint64_t *digests, uint8_t *good)
{
    for (int64_t block = 0; block < blocks; block++, digests += program->slots) {
        const int64_t *run = runs + starts[block] * (2 + program->kinds), count = starts[block + 1] - starts[block];
        int right = 1;
        for (int64_t i = 0; i < program->parts && right; i++) {
            const Part *part = program->part + i;
            State state;
            begin(&state, part->bytes);
            uint8_t *at = stored ? stored[block] + part->start : NULL;
            for (const Unit *unit = program->unit + part->first; unit < program->unit + part->first + part->count; unit++) {
                move_unit(program, &state, unit, at, run, count);
                at = at ? at + program->rows * unit->row_bytes : NULL;
            }
            if (!program->hashed)
                continue;
            if (program->mode == SCATTER)
                right = digests[part->slot] == end(&state, part->bytes);
            else
                digests[part->slot] = end(&state, part->bytes);
        }
        if (good)
            good[block] = (uint8_t)right;
    }
    finish();
}
