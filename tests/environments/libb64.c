/* Stands in for Debian's libb64, which perf_analyzer is linked with and uses for HTTP alone. */
#include <stdlib.h>

void base64_decode_block(void) { abort(); }
void base64_encode_block(void) { abort(); }
void base64_encode_blockend(void) { abort(); }
void base64_init_decodestate(void) { abort(); }
void base64_init_encodestate(void) { abort(); }
