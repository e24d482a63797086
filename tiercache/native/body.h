/* The loops of kernel.c, once for each set of instructions: it defines NAME, TARGET, Vec, load, store, stream, mix and
 * scramble before it includes this. */

/* Accumulates and copies whole stripes. `to` may be NULL: nothing is written then. */
TARGET static void NAME(stripes)(State *state, const uint8_t *from, uint8_t *to, int64_t count, int64_t ahead, int hashed, int streamed)
{
    if (!hashed) {
        if (streamed)
            for (int64_t i = 0; i < count; i++) {
                prefetch(from + i * STRIPE + ahead);
                NAME(stream)(to + i * STRIPE, NAME(load)(from + i * STRIPE));
            }
        else
            memcpy(to, from, count * STRIPE);
        return;
    }
    NAME(Vec) acc = NAME(load)((const uint8_t *)state->acc);
    while (count) {
        int64_t some;
        if (!state->left) { /* the last stripe of all has a place of its own in the secret, and none follows it */
            NAME(Vec) data = NAME(load)(from);
            acc = NAME(mix)(acc, data, SECRET + SECRET_BYTES - STRIPE - 7);
            if (to)
                NAME(store)(to, data);
            break;
        }
        some = BLOCK_STRIPES - state->at;
        some = some < state->left ? some : state->left;
        some = some < count ? some : count;
        const uint8_t *secret = SECRET + 8 * state->at;
        if (!to)
            for (int64_t i = 0; i < some; i++) {
                prefetch(from + i * STRIPE + ahead);
                acc = NAME(mix)(acc, NAME(load)(from + i * STRIPE), secret + 8 * i);
            }
        else if (streamed)
            for (int64_t i = 0; i < some; i++) {
                prefetch(from + i * STRIPE + ahead);
                NAME(Vec) data = NAME(load)(from + i * STRIPE);
                acc = NAME(mix)(acc, data, secret + 8 * i);
                NAME(stream)(to + i * STRIPE, data);
            }
        else
            for (int64_t i = 0; i < some; i++) {
                prefetch(from + i * STRIPE + ahead);
                NAME(Vec) data = NAME(load)(from + i * STRIPE);
                acc = NAME(mix)(acc, data, secret + 8 * i);
                NAME(store)(to + i * STRIPE, data);
            }
        state->left -= some;
        state->at += some;
        if (state->at == BLOCK_STRIPES) {
            acc = NAME(scramble)(acc);
            state->at = 0;
        }
        from += some * STRIPE;
        to = to ? to + some * STRIPE : NULL;
        count -= some;
    }
    NAME(store)((uint8_t *)state->acc, acc);
}
