// The interpreter for arm64. See the package comment for what it does.
// x20: buffer, x19: current record, x21: where to read to, x22: where to stop.
	.text
	.globl _start
_start:
	movz	x20, #0x2000, lsl #16
loop:
	mov	x21, x20
	add	x22, x20, #32
	bl	readfull
	ldr	x22, [x20]
	bl	readfull
	ldr	x19, [x20, #8]
next:
	ldr	x1, [x20, #16]
	cmp	x19, x1
	b.hs	done
	ldr	x9, [x19, #56]
	mov	x10, #0
	add	x11, x19, #8
	sub	x12, x20, #64
arg:
	ldr	x13, [x11], #8
	lsr	x14, x9, x10
	tbz	x14, #0, direct
	ldrsw	x13, [x13]
direct:
	str	x13, [x12], #8
	add	x10, x10, #1
	cmp	x10, #6
	b.lo	arg
	sub	x12, x20, #64
	ldp	x0, x1, [x12]
	ldp	x2, x3, [x12, #16]
	ldp	x4, x5, [x12, #32]
	ldr	x8, [x19]
	svc	#0
	str	x0, [x19, #72]
	cbnz	x0, nonzero
	ldr	x1, [x19, #80]
	cbz	x1, advance
	mov	x19, x1
	b	next
nonzero:
	cmn	x0, #11
	b.ne	failed
	ldr	x1, [x19, #56]
	tbnz	x1, #63, next
failed:
	cmn	x0, #4095
	b.lo	advance
	neg	x1, x0
	cmp	x1, #63
	b.hi	report
	ldr	x2, [x19, #64]
	lsr	x2, x2, x1
	tbz	x2, #0, report
advance:
	add	x19, x19, #88
	b	next
done:
	mov	x0, #0
report:
	str	x19, [x20]
	str	x0, [x20, #8]
	ldr	x1, [x20, #24]
	cbz	x1, write
	ldr	x1, [x1]
write:
	str	x1, [x20, #16]
	mov	x0, #3
	mov	x1, x20
	mov	x2, #24
	mov	x8, #64
	svc	#0
	b	loop
readfull:
	cmp	x21, x22
	b.hs	full
	mov	x0, #3
	mov	x1, x21
	sub	x2, x22, x21
	mov	x8, #63
	svc	#0
	cmp	x0, #0
	b.le	exit
	add	x21, x21, x0
	b	readfull
full:
	ret
exit:
	mov	x0, #125
	mov	x8, #94
	svc	#0
